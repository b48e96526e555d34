"""Tokenizers of every family: their own ids in blocks, what ends a document, and the padding that no text may hold."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import prepare_recipe, recipe_values, write_blocks, write_recipe
from tokenizer_families import FAMILIES, TEXTS, characters

from clm_dist import recipe
from clm_dist.config import ModelConfig
from clm_dist.data.blocks import Blocks
from clm_dist.data.tokenize import load_tokenizer
from clm_dist.errors import UserError
from clm_dist.model import transformers_versions
from clm_dist.model.architectures import GUIDE, LATER
from clm_dist.model.build import build_model
from clm_dist.model.configuration import model_configuration
from clm_dist.model.generate import generate
from clm_dist.preparation.prepare import prepare
from clm_dist.training.job import open_job

pytestmark = pytest.mark.skipif(transformers_versions.MAJOR < 5, reason="4.57 makes its tokenizers from files alone")

HERE = [row for row in (*GUIDE, *LATER) if transformers_versions.MAJOR in row.lives]
NASTY = [
    "caf\u00e9, na\u00efve & \uff21\uff22\uff23 \ufb01",
    "12,345.67\t two  spaces\n\nlines ",
    "你好 \U0001f600 e\u0301",
    "un##able <s [SEP it's",
    "!",
]
DOCUMENTS = [*TEXTS[:6], *NASTY]


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """(the tokenizer itself, its folder) by name, each made once."""
    made = {}

    def get(name):
        if name not in made:
            tokenizer = FAMILIES[name].make()
            folder = tmp_path_factory.mktemp("families") / name
            tokenizer.save_pretrained(folder)
            made[name] = tokenizer, folder
        return made[name]

    return get


# What prepare writes


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name != "canine"]
)  # whose million ids take half a minute
def test_blocks_hold_the_tokenizers_own_ids_and_one_end_after_each_document(name, family, desk, capsys):
    tokenizer, folder = family(name)
    known = FAMILIES[name]
    around = tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])
    assert around == known.around.split()  # what a model of the family reads around a text, and blocks do not hold
    found = desk.prepare(desk.write("a.jsonl", DOCUMENTS), tokenizer=str(folder), block_size=16)
    end = tokenizer.convert_tokens_to_ids(known.end)
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in DOCUMENTS]
    stream = [token for ids in documents for token in [*ids, end]]
    written = found.rows().reshape(-1).tolist()
    assert written == stream[: len(written)] and len(stream) - len(written) < 16
    assert found.manifest.splits["train"].tokens == len(stream)
    starts = np.cumsum([0, *(len(ids) + 1 for ids in documents[:-1])])
    assert np.load(found.folder / "train" / "documents.npy").tolist() == starts[starts < len(written)].tolist()
    assert stream.count(end) == len(DOCUMENTS)
    for other in set(around) - {known.end}:
        assert tokenizer.convert_tokens_to_ids(other) not in stream
    said = capsys.readouterr().out
    assert f"tokenising with {known.encoder}" in said or (
        known.encoder == "tiktoken" and "tokenising with fastok" in said
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_text_comes_back(name, family):
    """The very text, where nothing is normalized or unknown; else what it comes back as is encoded as itself."""
    tokenizer, _ = family(name)
    for text in [*TEXTS[:5], *NASTY]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids)
        if FAMILIES[name].gives_back and (name != "characters" or tokenizer.unk_token_id not in ids):
            assert back == text
        elif tokenizer.unk_token_id not in ids:
            assert tokenizer(back, add_special_tokens=False)["input_ids"] == ids


def test_a_separator_ends_documents_where_nothing_else_does(family, desk, capsys):
    """BERT: [SEP] is id 3 of its five special tokens, and the exported tokenizer says that texts end there."""
    _, folder = family("bert")
    found = desk.prepare(desk.write("a.jsonl", ["a b", "b"] * 8), tokenizer=str(folder), block_size=5)
    assert "documents end with [SEP], the tokenizer's separator (data.append_eos=false: with nothing)" in (
        capsys.readouterr().out
    )
    assert (found.rows() == 3).sum(axis=1).tolist() == [2] * 8
    saved = json.loads((found.folder / "tokenizer" / "tokenizer_config.json").read_text())
    assert (saved["eos_token"], saved["pad_token"]) == ("[SEP]", "[PAD]")
    plain = transformers.AutoTokenizer.from_pretrained(found.folder / "tokenizer")
    assert plain.eos_token_id == 3 and plain("a b")["input_ids"] == family("bert")[0]("a b")["input_ids"]


def test_nothing_between_documents_when_asked_for(family, desk, capsys):
    _, folder = family("bert")
    source = desk.write("a.jsonl", ["a b", "b"] * 8)
    found = desk.prepare(source, tokenizer=str(folder), block_size=6, append_eos=False)
    assert not (found.rows() == 3).any() and "separator" not in capsys.readouterr().out


def test_a_tokenizer_without_an_end_is_refused_with_what_to_set(desk):
    characters().save_pretrained(desk.folder / "endless")
    source = desk.write("a.jsonl", ["abc", "cab"] * 8)
    needle = (
        r"data.append_eos=true, but the tokenizer of .*endless has neither an eos_token nor a sep_token to end documents "
        r"with; name one of its tokens as eos_token in its tokenizer_config.json, or set data.append_eos=false"
    )
    desk.refused(source, needle, tokenizer=str(desk.folder / "endless"), block_size=3)
    found = desk.prepare(source, tokenizer=str(desk.folder / "endless"), block_size=3, append_eos=False)
    assert found.manifest.splits["train"].tokens == 6 * 8
    # the first remedy
    path = desk.folder / "endless" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "\ufffd"}))
    ended = desk.prepare(source, into="ended", tokenizer=str(desk.folder / "endless"), block_size=4)
    assert ended.rows()[:, 3].tolist() == [0] * 16


# Padding


def job(folder: Path, texts: list[str] | None, tokenizer: Path | None, **sections):
    """`train`'s own start over these texts."""
    data = {"tokenizer": str(tokenizer), "tokenizer_vocab_size": None} if tokenizer else {}
    values = recipe_values(folder, **{**sections, "data": {**data, **sections.get("data", {})}})
    config = recipe.load(write_recipe(folder / "recipe.yaml", values), [])
    if not Path(config.data.prepared_dir).exists():
        Path(config.data.source).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts or TEXTS))
        prepare(config)
    return open_job(config, overwrite=False)


def model(type_, **config):
    return {"type": type_, "preset": "tiny", "config": config}


LOOK_FOR_PADDING = [row.type for row in HERE if row.needs_padding]


@pytest.mark.parametrize("row", HERE, ids=lambda row: row.type)
def test_the_table_knows_who_looks_for_padding(row):
    """The same weights under two padding ids, one of them in the text: logits move where the model looks for it, only."""
    tokens = {"vocab_size": 300, "bos_token_id": 9, "eos_token_id": 9}
    config = ModelConfig(type=row.type, preset="tiny")
    one, other = (
        build_model(config, model_configuration(config, tokens | {"pad_token_id": pad}), 0).eval() for pad in (5, 6)
    )
    other.load_state_dict(one.state_dict())
    if row.type == "xglm":  # whose table of positions has zeros in the row of that number, whatever the text
        other.model.embed_positions.weights = one.model.embed_positions.weights
    one.config.use_cache = other.config.use_cache = False
    ids = torch.tensor([[7, 8, 9, 5, 11, 12, 13, 14]])
    with torch.no_grad():
        moved = not torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)
    assert moved == row.needs_padding


@pytest.fixture(scope="session")
def padded_with_its_end(tmp_path_factory):
    """A folder of blocks by GPT-2's convention, pad_token = eos_token."""
    folder = tmp_path_factory.mktemp("padded")
    tokenizer = FAMILIES["gpt2"].make()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "gpt2")
    job(folder, ["a cat!", "a dog"] * 40, folder / "gpt2", model=model("gpt2"))
    return folder


@pytest.fixture(scope="session")
def loud(tmp_path_factory):
    """A folder of blocks by a tokenizer of the bytes and an end of text, without padding; there is an exclamation mark."""
    folder = tmp_path_factory.mktemp("loud")
    job(folder, ["a cat!", "a dog"] * 40, None, model=model("gpt2"), data={"tokenizer_vocab_size": 257})
    return folder


@pytest.mark.parametrize("type_", LOOK_FOR_PADDING)
def test_an_end_that_is_the_padding_is_refused_where_the_model_looks_for_it(type_, padded_with_its_end):
    """The settings of the message work."""
    folder = padded_with_its_end
    with pytest.raises(UserError) as caught:
        job(folder, None, folder / "gpt2", model=model(type_))
    said = str(caught.value)
    # the first byte that these texts do not have: '"' is the second of GPT-2's alphabet, after the end of text and "!"
    assert said == (
        f"{type_} takes id 0 for padding wherever it stands (no position, nothing learned of it), but '<|endoftext|>', "
        "which ends documents, is in the text; set model.config.pad_token_id=2, which no text has, or give the tokenizer a "
        "pad_token of its own and prepare again"
    )
    tokenizer = load_tokenizer(str(folder / "gpt2"))
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "!", '"']
    found = job(folder, None, folder / "gpt2", model=model(type_, pad_token_id=2))
    assert found.model_configuration.pad_token_id == 2


def test_the_padding_of_another_vocabulary_is_found_in_the_text(loud, tmp_path):
    """RoBERTa's own padding id, 1, is "!" in a tokenizer that is trained here; without one in the text it harms nobody."""
    data = {"tokenizer_vocab_size": 257}
    with pytest.raises(
        UserError, match=r"roberta takes id 1 for padding .* but '!' is in the text; set model.config.pad"
    ):
        job(loud, None, None, model=model("roberta"), data=data)
    job(tmp_path, ["a cat.", "a dog"] * 40, None, model=model("roberta"), data=data)
    with pytest.raises(UserError, match="but '!' is in the text"):  # a prompt is text
        prompt = {"prompts": ["oh!"], "max_new_tokens": 8}
        job(tmp_path, None, None, model=model("roberta"), data=data, generate=prompt)


def test_padding_at_the_ends_of_blocks_is_none_of_the_text(family, tmp_path):
    packed = {"packing": "best_fit", "block_size": 16}
    found = job(tmp_path, ["a cat!", "a dog"] * 40, family("roberta")[1], model=model("roberta"), data=packed)
    assert found.train_blocks.num_padding and found.model_configuration.pad_token_id == 1


def test_a_remedy_that_needs_more_positions_says_so(tmp_path):
    """Every id below 40 in the text, and 60 positions: 41 of them stand before the first token."""
    config = {"pad_token_id": 1, "max_position_embeddings": 60}
    alphabet = "".join(map(chr, range(33, 33 + 42)))  # ids 1 to 42 of the byte-level alphabet
    data = {"block_size": 32, "tokenizer_vocab_size": 257}
    with pytest.raises(
        UserError, match=r"set model.config.pad_token_id=43 model.config.max_position_embeddings=76, which"
    ):
        job(tmp_path, [alphabet, alphabet[::-1]] * 30, None, model=model("roberta", **config), data=data)


def test_trained_weights_know_one_padding_id(family, tmp_path):
    tokenizer, folder = family("gpt2")
    plain = model_configuration(ModelConfig(type="roberta", preset="tiny"), {"vocab_size": 500})
    transformers.RobertaForCausalLM(plain).save_pretrained(tmp_path / "weights")
    assert tokenizer.convert_ids_to_tokens(1) == "!"
    with pytest.raises(
        UserError, match=r"'!' is in the text; set data.tokenizer to the model's own and prepare again, or"
    ):
        job(
            tmp_path,
            ["a cat!", "a dog"] * 40,
            folder,
            model={"name": str(tmp_path / "weights"), "type": None, "config": {}},
        )


def test_no_padding_at_all(loud):
    needle = (
        "roberta has no padding id, and cannot number positions without one; set model.config.pad_token_id=2, which"
    )
    with pytest.raises(UserError, match=needle):
        job(loud, None, None, model=model("roberta", pad_token_id=None), data={"tokenizer_vocab_size": 257})


@pytest.mark.parametrize("type_", ["llama", "bert", "bart", "opt"])
def test_the_end_of_documents_is_learned_though_it_is_the_padding(type_):
    """One of a pair is what transformers does: no gradient for the row of the padding id."""
    config = ModelConfig(type=type_, preset="tiny", config={"tie_word_embeddings": False})
    tokens = {"vocab_size": 300, "bos_token_id": 5, "eos_token_id": 5, "pad_token_id": 5}

    def gradient(padding):
        built = build_model(config, model_configuration(config, tokens), 0)
        embedding = built.get_input_embeddings()
        embedding.padding_idx = padding(embedding)
        built.config.use_cache = False
        built(input_ids=torch.tensor([[7, 5, 9, 11]])).logits[0, -1].square().sum().backward()
        return embedding.weight.grad[5].abs().sum()

    assert gradient(lambda ours: ours.padding_idx) > 0
    assert gradient(lambda ours: 5) == 0


def test_ids_before_the_padding(tmp_path):
    from clm_dist.data.blocks import BlockWriter

    writer = BlockWriter(tmp_path / "padded", 3, np.dtype("uint8"), "train")
    writer.write(np.array([[4, 1, 0], [2, 2, 4]], dtype=np.uint8), np.array([0, 3]), np.array([2, 3], dtype=np.uint32))
    writer.close()
    padded = Blocks(tmp_path / "padded")
    assert padded.ids_present(6).tolist() == [False, True, True, False, True, False]
    assert [padded.holds(token) for token in (0, 1, 4, 5, 300, -1)] == [False, True, True, False, False, False]
    write_blocks(tmp_path / "full", np.array([[4, 1, 0], [2, 2, 4]], dtype=np.uint8))
    full = Blocks(tmp_path / "full")
    assert full.ids_present(6).tolist() == [True, True, True, False, True, False] and full.holds(0)


# From text to a model that others load

PAIRS = [
    ("bert", "bert"), ("roberta", "roberta"), ("llama", "llama"), ("mbart", "xlm-roberta"), ("xlnet", "xlnet"),
    ("gpt2", "characters"),
]  # fmt: skip


@pytest.mark.parametrize(("type_", "name"), PAIRS, ids=lambda one: one)
def test_from_text_to_an_exported_model(type_, name, family, command, tmp_path):
    """A few steps; then transformers alone: the same ids, and the text that the run wrote down."""
    tokenizer, folder = family(name)
    own = {
        "data": {"tokenizer": str(folder), "tokenizer_vocab_size": None, "block_size": 32},
        "model": {"type": type_, "preset": "tiny", "config": {}, "pad_vocab_to_multiple_of": 64},
        "generate": {"prompts": ["the cat"], "max_new_tokens": 6, "do_sample": False},
    }
    written = prepare_recipe(tmp_path, 60, **own)
    done = command("train", written)
    assert done.code == 0, done.err
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    for text in [*TEXTS[:3], *NASTY]:
        assert exported(text)["input_ids"] == tokenizer(text)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    assert (exported.eos_token_id, exported.pad_token) == (end, FAMILIES[name].pad)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert plain.get_input_embeddings().weight.shape[0] % 64 == 0
    assert plain.config.eos_token_id == plain.generation_config.eos_token_id == end
    config = recipe.load(written, [])
    [*_, row] = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    again = generate(
        plain, load_tokenizer(str(tmp_path / "run" / "model")), row["prompt"], config.generate, config.seed
    )
    assert again == row["text"] and again.startswith("the cat")
