"""Tokenizers of every family, trained here on a few texts and put into transformers' own classes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from conftest import SAMPLE, read_rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [" ".join(row["answers"]["text"]) for row in read_rows(SAMPLE)][:60]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SENTENCEPIECE = ["<unk>", "<s>", "</s>"]


def _trained(tokenizer: Tokenizer, trainer: Any) -> dict[str, Any]:
    """vocab and merges, as files of transformers hold them."""
    tokenizer.train_from_iterator(TEXTS, trainer)
    return json.loads(tokenizer.to_str())["model"]


def _byte_level(special: list[str]) -> dict[str, Any]:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model = _trained(bpe, trainer)
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def _sentencepiece_bpe() -> dict[str, Any]:
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    special = [*SENTENCEPIECE, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, max_token_length=12, show_progress=False)
    model = _trained(bpe, trainer)
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def _unigram(special: list[str]) -> list[tuple[str, float]]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False
    )  # fmt: skip
    return [tuple(piece) for piece in _trained(tokenizer, trainer)["vocab"]]


def _word_piece() -> dict[str, int]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=BERT, show_progress=False)
    return _trained(tokenizer, trainer)["vocab"]


def characters(**special: str) -> Any:
    """A token a character; what a document ends with, if anything, is given."""
    words = Tokenizer(models.WordLevel(unk_token="\ufffd"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    tokens = ["\ufffd", *dict.fromkeys(special.values())]
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=tokens, show_progress=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="\ufffd", **special)


@dataclass(frozen=True)
class Family:
    """One of them, and what is known of it beforehand."""

    make: Callable[[], Any]
    end: str  # after each document
    pad: str | None
    around: str  # the special tokens that it puts around a text when asked for a model's input
    gives_back: bool = True  # decode gives the very text
    encoder: str = "tokenizers"  # the fastest that is proved for it


FAMILIES = {
    "gpt2": Family(
        lambda: transformers.GPT2Tokenizer(**_byte_level(["<|endoftext|>"])), "<|endoftext|>", None, "", encoder="tiktoken"
    ),
    "roberta": Family(
        lambda: transformers.RobertaTokenizer(**_byte_level(FAIRSEQ)), "</s>", "<pad>", "<s> </s>", encoder="tiktoken"
    ),
    "llama": Family(lambda: transformers.LlamaTokenizer(**_sentencepiece_bpe(), add_bos_token=True), "</s>", None, "<s>"),
    "t5": Family(
        lambda: transformers.T5Tokenizer(_unigram(["<pad>", "</s>", "<unk>"]), extra_ids=0), "</s>", "<pad>", "</s>",
        gives_back=False,
    ),
    "xlm-roberta": Family(
        lambda: transformers.XLMRobertaTokenizer(_unigram(FAIRSEQ)), "</s>", "<pad>", "<s> </s>", gives_back=False
    ),
    "albert": Family(
        lambda: transformers.AlbertTokenizer(_unigram(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"])), "[SEP]", "<pad>",
        "[CLS] [SEP]", gives_back=False,
    ),
    "xlnet": Family(
        lambda: transformers.XLNetTokenizer(_unigram([*SENTENCEPIECE, "<sep>", "<pad>", "<cls>", "<mask>"])), "</s>",
        "<pad>", "<sep> <cls>", gives_back=False,
    ),
    "bert": Family(
        lambda: transformers.BertTokenizer(_word_piece()), "[SEP]", "[PAD]", "[CLS] [SEP]", gives_back=False
    ),
    "characters": Family(lambda: characters(eos_token="\x03", pad_token="\x00"), "\x03", "\x00", ""),
    "byt5": Family(transformers.ByT5Tokenizer, "</s>", "<pad>", "</s>", encoder="transformers"),
    "canine": Family(transformers.CanineTokenizer, "\ue001", "\x00", "\ue000 \ue001", encoder="transformers"),
}  # fmt: skip
