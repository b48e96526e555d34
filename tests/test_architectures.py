"""The table of architectures, their configurations and presets, and what is refused."""

import json
import re

import pytest
import torch
import transformers
from conftest import ROOT
from transformers import BertConfig, BertLMHeadModel

from clm_dist.config import ModelConfig
from clm_dist.errors import ConfigError, UserError
from clm_dist.model import matrix, transformers_versions
from clm_dist.model.architectures import BOTH_WRONG, FUTURE, GUIDE, IDENTITY, LATER, NEXT_TOKEN, NOTHING
from clm_dist.model.build import build_model, load_model
from clm_dist.model.checkpointing import checkpoint_activations
from clm_dist.model.configuration import load_configuration, model_configuration, told
from clm_dist.model.positions import check_fits, max_positions

IDS = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": None}
HERE = [row for row in (*GUIDE, *LATER) if transformers_versions.MAJOR in row.lives]
only_5 = pytest.mark.skipif(transformers_versions.MAJOR < 5, reason="of transformers 5")


def built(type_, preset="tiny", **settings):
    return model_configuration(ModelConfig(type=type_, preset=preset, config=settings), IDS)


def test_the_guide_has_59_of_which_21_are_right_as_it_uses_them():
    assert len(GUIDE) == 59 and len({row.type for row in (*GUIDE, *LATER)}) == 59 + len(LATER)
    # measured on 5.23 and 4.57 (docs/architectures.md): 21 right, 19 encoders, the others
    counts = {
        kind: sum(row.guide == kind for row in GUIDE) for kind in (NEXT_TOKEN, FUTURE, IDENTITY, BOTH_WRONG, NOTHING)
    }
    assert counts == {NEXT_TOKEN: 21, FUTURE: 17, IDENTITY: 10, BOTH_WRONG: 5, NOTHING: 6}
    assert sum(5 not in row.lives for row in GUIDE) == 6
    assert len(LATER) >= 15


@pytest.mark.parametrize("row", HERE, ids=lambda row: row.type)
def test_a_row_says_what_the_library_says(row):
    """Tying, kernels and checkpointing by the classes themselves; `small` is one of some millions of parameters."""
    from clm_dist.planning.shapes import shapes

    config = ModelConfig(type=row.type, preset="tiny")
    plain = model_configuration(config, IDS)
    model = build_model(config, plain, 0)
    major = transformers_versions.MAJOR
    if row.type != "transfo-xl":  # its embedding is of another kind, which is tied all the same
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = getattr(head, "weight", None) is getattr(embedding, "weight", embedding)  # MusicGen has lists of them
        assert tied == (major in row.tied)
    assert bool(getattr(model, "_supports_sdpa", False)) == (major in row.sdpa)
    if row.type != "gpt_bigcode":  # 4.57 says yes and computes nothing again
        assert model.supports_gradient_checkpointing == (major in row.checkpointing)
    frozen = [name for name, one in model.named_parameters() if not one.requires_grad]
    assert all(any(part in name for name in frozen) for part in row.unused)
    if major not in row.checkpointing:
        with pytest.raises(UserError, match="cannot compute activations again"):
            checkpoint_activations(model)
    small = shapes(config, model_configuration(config.model_copy(update={"preset": "small"}), IDS)).parameters
    assert 5e6 < small < 1.2e8, small


@only_5
@pytest.mark.parametrize("row", [row for row in GUIDE if 5 not in row.lives], ids=lambda row: row.type)
def test_the_six_that_left_say_where_they_live(row):
    with pytest.raises(UserError) as caught:
        built(row.type)
    said = str(caught.value)
    assert re.match(rf"model.type={row.type} has left transformers 5 \(here: 5\.", said)
    assert "transformers==4.57.6" in said and "make .venv-legacy/.installed" in said
    assert ("pytorch-quantization" in said) == (row.type == "qdqbert")


def test_a_folder_of_one_that_left_says_so_too(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "open-llama"}')
    if transformers_versions.MAJOR >= 5:
        with pytest.raises(UserError, match=r"\(OpenLlama\) has left transformers 5"):
            load_configuration(str(tmp_path))
    else:
        assert load_configuration(str(tmp_path)).model_type == "open-llama"


@pytest.mark.parametrize(
    ("type_", "needle"),
    [
        ("bertt", r"model.type=bertt is no causal language model that transformers knows; did you mean bert\?"),
        ("zzzzzz", "knows; `clm-dist architectures` lists them"),
        ("vit", "model.type=vit is no causal language model: transformers has no head for it that predicts text"),
        ("distilbert", "model.type=distilbert is no causal language model"),
    ],
)
def test_unknown_types(type_, needle):
    with pytest.raises(UserError, match=needle):
        model_configuration(ModelConfig(type=type_), IDS)


def test_a_loaded_encoder_is_told_to_be_a_decoder_and_the_user_has_the_last_word(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertLMHeadModel(BertConfig(vocab_size=60, is_decoder=False, **sizes)).save_pretrained(tmp_path)
    plain = load_configuration(str(tmp_path))
    assert plain.is_decoder is True and plain.add_cross_attention is False
    assert told(plain) == (
        "BERT as a left-to-right language model: is_decoder=true, add_cross_attention=false (docs/architectures.md)"
    )
    own = model_configuration(ModelConfig(name=str(tmp_path), config={"is_decoder": False}), IDS)
    assert own.is_decoder is False
    assert load_model(str(tmp_path)).config.is_decoder is True


@pytest.mark.parametrize(
    ("type_", "settings", "positions"),
    [
        ("gpt2", {}, 1024),
        ("roberta", {}, 512 - 0 - 1),  # position 0 is the padding's (pad_token_id=0)
        ("roberta", {"pad_token_id": 7}, 512 - 7 - 1),
        ("llama", {"max_position_embeddings": 2048}, 2048),
        ("bloom", {}, None),
        ("falcon", {"alibi": True}, None),
        ("mamba", {}, None),
        ("xlnet", {}, None),
        ("mpt", {"max_seq_len": 64}, 64),
        ("codegen", {}, 2048),
    ],
)
def test_positions_by_their_kind(type_, settings, positions):
    assert (
        max_positions(built(type_, **({"pad_token_id": 0} | settings if type_ == "roberta" else settings))) == positions
    )


@pytest.mark.parametrize(("kind", "positions"), [("linear", 4096), ("dynamic", 4096), ("llama3", 2048)])
def test_scaled_rotary_positions(kind, positions):
    plain = built("llama", max_position_embeddings=2048)
    setattr(plain, transformers_versions.rope_field(), {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4})
    assert max_positions(plain) == positions


def refusal(plain, block_size):
    with pytest.raises(ConfigError) as caught:
        check_fits(plain, block_size, 300, "it")
    return "\n".join(caught.value.problems)


def test_block_sizes_that_break_a_rule():
    reformer = built("reformer", local_attn_chunk_length=16)
    check_fits(reformer, 48, 300, "it")
    check_fits(reformer, 12, 300, "it")  # shorter than a chunk
    assert "data.block_size=40 is no multiple of 16" in refusal(reformer, 40)
    assert "set data.block_size=32 and prepare again" in refusal(reformer, 40)
    axial = built("reformer", axial_pos_embds=True, axial_pos_shape=[4, 16], axial_pos_embds_dim=[16, 16])
    check_fits(axial, 64, 300, "it")
    assert "data.block_size=32, but it trains at 64 tokens alone" in refusal(axial, 32)
    hashed = built("reformer", attn_layers=["local", "lsh"], local_attn_chunk_length=32, lsh_attn_chunk_length=32)
    assert "no left-to-right model at data.block_size=64" in refusal(hashed, 64)
    assert "model.config.attn_layers=[local, local] or model.config.lsh_attn_chunk_length=64" in refusal(hashed, 64)
    check_fits(hashed, 32, 300, "it")
    assert "data.block_size=513 exceeds the 512 positions of it; set data.block_size=512" in refusal(built("bert"), 513)
    rotary = refusal(built("llama", max_position_embeddings=64), 100)
    assert "model.config.max_position_embeddings=100 from scratch" in rotary
    assert f"model.config.{transformers_versions.rope_field()}={{rope_type: linear, factor: 2.0" in rotary


def test_the_vocabulary_is_padded_when_asked(tmp_path):
    config = ModelConfig(type="gpt2", preset="tiny", pad_vocab_to_multiple_of=64)
    plain = model_configuration(config, IDS)
    assert plain.vocab_size == 320
    build_model(config, plain, 0).save_pretrained(tmp_path)
    loaded = ModelConfig(name=str(tmp_path), pad_vocab_to_multiple_of=128)
    one, other = (build_model(loaded, model_configuration(loaded, IDS), 0, vocab_size=390) for _ in range(2))
    assert one.config.vocab_size == one.get_input_embeddings().weight.shape[0] == 512
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(one.get_input_embeddings().weight[:320], load_model(str(tmp_path)).get_input_embeddings().weight)


def test_settings_of_another_architecture_are_told_at_once():
    """As of the demo's recipe, whose sizes are GPT-2's."""
    with pytest.raises(ConfigError) as caught:
        built("bert", n_layer=4, n_embd=8, hiden_size=8)
    near, far = caught.value.problems
    assert near == "unknown key model.config.hiden_size; did you mean hidden_size?"
    assert far.startswith(
        "model.config has n_layer, n_embd, which bert does not know (its sizes: hidden_size, num_hidden_layers"
    )
    assert far.endswith("or write model.config={} where they come from another architecture's recipe")


def test_a_preset_is_for_types(tmp_path):
    from conftest import recipe_values

    from clm_dist.recipe import build

    values = recipe_values(tmp_path)
    values["model"] = {"name": "someone/model", "preset": "tiny"}
    with pytest.raises(ConfigError, match=r"model\.preset=tiny gives sizes to model.type"):
        build(values)


def test_attention_that_an_architecture_has_not_is_refused(tmp_path):
    config = ModelConfig(type="bloom", preset="tiny", attention="sdpa")
    with pytest.raises(UserError, match=r"model\.attention=sdpa"):
        build_model(config, model_configuration(config, IDS), 0)
    eager = ModelConfig(type="gpt2", preset="tiny", attention="eager")
    model = build_model(eager, model_configuration(eager, IDS), 0)
    model.save_pretrained(tmp_path)
    for kind in ("flash_attention_2", "no_such_kind"):  # neither is installed, of one nobody has heard
        with pytest.raises(
            UserError, match=rf"^model\.attention={kind} is not to be had for gpt2 here \(.*\); leave it out"
        ):
            load_model(str(tmp_path), attention=kind)
    assert build_model(eager, model_configuration(eager, IDS), 0).config._attn_implementation == "eager"


def test_translators_do_not_force_their_last_token():
    config = ModelConfig(type="bart", preset="tiny")
    generation = build_model(config, model_configuration(config, IDS), 0).generation_config
    assert generation.forced_eos_token_id is None and generation.num_beams in (None, 1)
    assert transformers.BartConfig().forced_eos_token_id == 2 or transformers_versions.MAJOR >= 5


def test_the_page_is_what_is_recorded():
    """docs/architectures.md is generated: `python tests/architectures/suite.py page` writes it anew."""
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    begin, end = "<!-- by: clm-dist architectures --markdown -->\n", "\n<!-- end -->"
    assert text[text.index(begin) + len(begin) : text.index(end)] == matrix.markdown()


def test_every_architecture_is_recorded_with_the_pinned_versions():
    """Of each version of transformers: every row, every cell that each can have."""
    for major, constraints in ((5, "constraints.txt"), (4, "constraints-legacy.txt")):
        recorded = matrix.recorded(major)
        pinned = (ROOT / constraints).read_text()
        for name, version in recorded["versions"].items():
            assert f"{name}=={version.partition('+')[0]}\n" in pinned, name
        for proof in matrix.proofs(major):
            needed = set(matrix.CELLS) - (set() if major == 5 or proof.row.lives == (4,) else {"zero2", "zero3"})
            assert needed <= set(proof.cells), proof.row.type
            assert proof.cells["trained"] == proof.cells["causal"] == proof.cells["our loss"] == "yes", proof.row.type


def test_what_the_page_says_of_bert_and_bart_happens():
    """Its ten lines, run."""
    import contextlib
    import io

    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    bart, bert = (float(one) for one in re.findall(r"loss (\d\.\d\d)", said.getvalue()))
    assert bart < 0.01 and bert < 0.5


def test_the_command_shows_what_is_recorded(capsys):
    from clm_dist.cli import main

    assert main(["architectures"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(GUIDE) + len(LATER)
    assert any(line.startswith("mega ") and " gone " in line for line in lines)
    assert main(["architectures", "bert"]) == 0
    out = capsys.readouterr().out
    assert "here it is given is_decoder=true, add_cross_attention=false" in out and "transformers 4.57" in out
    assert main(["architectures", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proved"]["transformers-5"]["rows"]["bert"]["trained"] == "yes"
    assert main(["architectures", "Reformer"]) == 0
    out = capsys.readouterr().out
    assert "blocks are a multiple of its chunks of attention" in out and "text is made by a pass over the whole" in out
    assert main(["architectures", "bart_"]) == 2
    assert "bart_ is no row of the table; did you mean bart? (what has none is tried by" in capsys.readouterr().err
