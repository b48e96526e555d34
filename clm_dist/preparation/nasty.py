"""Strings on which tokenizers may differ: what encoders are compared on before one is used, and what tests use."""

from collections.abc import Iterable
from itertools import product

# Signs whose class or case is a trap, each tried in many contexts. Of letters and digits: scripts beside Latin, those
# that fold to ASCII (long s, Kelvin), title case, ligatures, modifiers, superscripts, fractions, Roman and other numbers.
LETTERS = (
    "\u00aa\u00b5\u00df\u00e9\u00fc\u0130\u0131\u0149\u017f\u01c5\u01f0\u02b0\u02bc\u0391\u03c2\u0416\u0587\u05d0\u0627"
    "\u0905\u0e01\u10d0\u1100\u1161\u11a8\u13a0\u1e9e\u1fbc\u2126\u212a\u212b\u3042\u30a2\u3105\u4e2d\ua78b\uac00\ud7a3"
    "\uf900\ufb00\ufb03\ufb05\uff21\uff41\U00010400\U0001d400\U00020000\U0002fa1d\U00030000"
)
NUMBERS = (
    "\u00b2\u00b9\u00bc\u0660\u06f1\u07c2\u0966\u09e7\u0b67\u0e53\u0f20\u0f33\u1040\u16ee\u17e1\u1810\u2070\u2074\u2080"
    "\u2153\u2160\u2188\u2460\u24ea\u2776\u2cfd\u3007\u3021\u3192\u3220\u3280\ua620\ua8d3\uff10\uff19\U00010107"
    "\U0001d7ce\U0001f100\U0001fbf0\U00011c50"
)
MARKS = (
    "\u0300\u0301\u0308\u0327\u0338\u0345\u0489\u05b0\u064b\u093c\u0940\u0e34\u1ab0\u20dd\u302a\u3099\ufe0f\U000e0100"
)
SPACES = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\u00a0\u1680\u180e\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u200b\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
)
OTHERS = (
    "\x00\x01\x07\x08\x1b\x7f\x80\x9f\u00ad\u00b4\u2018\u2019\u201c\u2026\u200d\u200e\u202e\u20ac\u2581\u2588\u3001\u3002"
    "\u0378\u2fe0\ue000\uf8ff\ufdd0\ufffd\ufffe\uffff\uff07\U0001f600\U0001f1e6\U0001f3fd\U000e0020\U000f0000\U0010fffd\U0010ffff"
)

CONTEXTS = (
    *("{0}", "a{0}", "{0}a", " {0}", "{0} ", "A{0}b", "1{0}", "{0}1", "\n{0}", "{0}\n", "  {0}  ", "'{0}", "'{0}{0}"),
    *(".{0}", "{0}.", "{0}{0}", "{0}\u0301", "\u00e9{0}", "{0}'s", "{0}\r\n{0}", " {0}{0}{0} {0}"),
)

SPECIAL = (
    *(
        "<|endoftext|>",
        "<|endoftext",
        "<|endoftext| |>",
        "<|",
        "<s>",
        "</s>",
        "<s",
        "<unk>",
        "<pad>",
        "<mask>",
        "[CLS]",
    ),
    *("[SEP]", "[PAD]", "[UNK]", "[MASK]", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<think>"),
    *("</think>", "<0x0A>", "<0xFF>", "##ing", "\u2581the", "\u0120the", "\u010a", "</w>", "@@"),
)

WORDS = (
    "Hello, world! It's 5 o'clock; don't you'll we've I'm he'd they're.",
    "HELLO IT'S DON'T YOU'LL WE'VE I'M HE'D THEY'RE 'tis 'Twas rock'n'roll ''s ' s 'l 'll 'v 've 'r 're 'LL 'Ve",
    "It\u2019s \u2018quoted\u2019 \u201cdouble\u201d 'it\u017f 'S 's '\u017f x'\u017ft \u212aelvin 'K can\u02bct",
    "def f(x):\n\tif x is None:\n        return {'a': [1, 2.5e-10]}\n\n\n    # done \r\n\r\n\tpass  \n",
    "https://example.org/a_b/c?d=e&f=%20#g me@example.org C:\\dir\\file.txt 12,345,678.90 1234567890123 v1.2.3-rc4",
    "cafe\u0301 caf\u00e9 na\u00efve Stra\u00dfe \ufb01n \u01c4ungla \u0130stanbul \u1e9e \u2126hm \u212bngstr\u00f6m",
    "\u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439 \u043c\u0438\u0440, \u0393\u03b5\u03b9\u03ac",
    "\u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5 \u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd \u202bRTL\u202c x\u200e",
    "\u0645\u0631\u062d\u0628\u0627\u064b \u0661\u0662\u0663 \u200f \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4e00\u4e8c\u4e09 \u3053\u3093\u306b\u3061 \uff11\uff12\uff13 \uff21\uff22",
    "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab\u1100\u116e\u11a8 \uac00\u11a8 \u1100\uac00 A\u030a \u0e31\u0e2a\u0e14\u0e35",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd \u2764\ufe0f 1\ufe0f\u20e3",
    "\U0001f1e9\U0001f1ea \U0001f3f4\U000e0067\U000e0062\U000e007f \U0001f600\U0001f600",
    "a" + "".join(chr(0x300 + n % 0x70) for n in range(200)) + "b \u0e01" + "\u0e34\u0e48" * 50,
    "q\u0323\u0307 q\u0307\u0323 \u1e69 s\u0323\u0307 \u0344 \u0958 \u2adc \ufb1d \U0001d15e \ufdfa \u2460 x\u00b2",
)

RUNS = (2, 3, 4, 5, 7, 16, 33, 127, 600)
REPEATED = (
    *(
        "a",
        "A",
        "ab",
        "7",
        "12 ",
        " ",
        "\n",
        "\t",
        "\r\n",
        " \n",
        "\n ",
        "-",
        "=",
        ".",
        "!?",
        "'",
        "'s",
        "a1",
        "a ",
        "_a",
    ),
    *("\u00e9", "e\u0301", "\u4e2d", "\u0301", "\U0001f600", "\u00a0", "\u3000 ", "\x00", "\u0661", "the"),
)
BORDERS = (("", ""), ("a", "b"), ("a ", "b"), (".", "1"), ("\n", ""), (" ", " b"))
# beginnings of 64 code points each: a stripe of every script, private use, noncharacters, the end
BLOCKS = [*range(0, 0xD800, 0x180), *range(0xE000, 0x10000, 0x400), *range(0x10000, 0x20000, 0x1000), 0x2F800, 0x10FFC0]


def nasty_texts(added: Iterable[str] = ()) -> list[str]:
    """Some thousand texts, 150 kB, the same each time. `added`: the added tokens of a tokenizer, few of them in context."""
    tokens = [*SPECIAL, *added]
    signs = list(dict.fromkeys([*map(chr, range(256)), *LETTERS, *NUMBERS, *MARKS, *SPACES, *OTHERS]))
    texts = ["", *tokens, *WORDS, "\n".join(WORDS)]
    texts += ["\v".join(context.format(sign) for context in CONTEXTS) for sign in signs]
    texts += [context.format(sign) for sign in signs for context in CONTEXTS[:5:2]]
    texts += ["".join(three) for three in product("aA1 \n'.\r\u0301\u4e2d", repeat=3)]
    texts += [before + space * count + after for space in SPACES for count in (1, 2, 3) for before, after in BORDERS]
    texts += [
        piece * count + end for piece in REPEATED for count in RUNS for end in ("", "x", " ", "\n")[: 500 // count]
    ]
    texts += [piece * RUNS[-1] for piece in REPEATED]
    texts += ["".join(map(chr, range(start, start + 64))) for start in BLOCKS]
    texts += [_noise(seed) for seed in range(40)]
    frames = ("x{0}y", " {0} ", "{0}{0}", "\n{0}\n", "\u00e9{0}\u0301")
    texts += [frame.format(token) for token in tokens[:100] for frame in frames]
    return [*texts, *(token[:-1] for token in tokens[:100])]


def _noise(seed: int) -> str:
    """300 signs drawn from everything above, by a small generator of our own (that of `random` may change)."""
    signs = "aeinorst  ETA\n'.,1023-" * 4 + LETTERS + NUMBERS + MARKS + SPACES + OTHERS
    state, drawn = seed * 2 + 1, []
    for _ in range(300):
        state = state * 6364136223846793005 % 2**64 + 1442695040888963407  # Knuth's for MMIX
        drawn.append(signs[(state >> 33) % len(signs)])
    return "".join(drawn)
