"""Text from a model: reproducible, streamed, refused where it cannot be."""

import json

import pytest
import torch

from clm_dist.config import GenerateConfig, ModelConfig
from clm_dist.data.tokenize import load_tokenizer
from clm_dist.errors import UserError
from clm_dist.model.build import build_model, load_model
from clm_dist.model.configuration import model_configuration
from clm_dist.model.generate import _likely, by_passes, generate, prompt_ids, saved_settings


@pytest.fixture(scope="module")
def model(trained):
    return load_model(str(trained / "run" / "model"))


@pytest.fixture(scope="module")
def tokenizer(trained):
    return load_tokenizer(str(trained / "run" / "model"))


def test_a_seed_is_a_text_and_the_generator_is_left_alone(model, tokenizer):
    settings = GenerateConfig(max_new_tokens=12)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    texts = [generate(model, tokenizer, "the cat", settings, seed) for seed in (1, 1, 2)]
    assert torch.rand(1) == expected
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("the cat") for text in texts)


def test_greedy_is_the_likeliest_token_each_time(model, tokenizer):
    text = generate(model, tokenizer, "the cat", GenerateConfig(max_new_tokens=6, do_sample=False), seed=0)
    ids = tokenizer("the cat")["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_prompts_that_do_not_fit(tokenizer):
    settings = GenerateConfig(max_new_tokens=60)
    with pytest.raises(UserError, match=r"exceed the model's 64 positions; shorten the prompt or set generate.max_new"):
        prompt_ids(tokenizer, "the cat sees the big red dog", settings, 64)
    assert prompt_ids(tokenizer, "", settings, 64) == [tokenizer.eos_token_id]


def test_the_exported_model_remembers_its_sampling(model):
    assert saved_settings(model, {}).max_new_tokens == 8  # of the recipe
    assert saved_settings(model, {"top_k": 3}).top_k == 3


def test_the_command(command, trained, tmp_path):
    model = trained / "run" / "model"
    done = command("generate", model, "--prompt", "the cat", "--prompt", "a dog", "generate.max_new_tokens=5")
    assert done.code == 0, done.err
    assert [line.startswith(start) for line, start in zip(done.out.splitlines(), ("the cat", "a dog"), strict=True)]

    (tmp_path / "prompts.txt").write_text("the cat\n\nthe dog\n")
    arguments = ("generate", model, "--prompts-file", tmp_path / "prompts.txt", "--output", tmp_path / "texts.jsonl")
    assert command(*arguments).code == 0
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the cat", "the dog"]
    assert all(row["text"].startswith(row["prompt"]) for row in rows)
    again = command(*arguments)
    assert again.code == 2 and "texts.jsonl exists; choose another name" in again.err


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["nowhere", "--prompt", "x"], "model.name=nowhere"),
        (["MODEL"], "no prompt; give --prompt TEXT"),
        (["MODEL", "--prompts-file", "nowhere.txt"], "nowhere.txt does not exist"),
        (["MODEL", "--prompt", "x", "generate.top_kk=3"], "unknown key generate.top_kk; did you mean generate.top_k?"),
        (["MODEL", "--prompt", "x", "generate.top_p=3"], "generate.top_p=3: input should be less than or equal to 1"),
        (["MODEL", "--prompt", "x", "optim.lr=3"], "optim is no setting of generate"),
        (["MODEL", "--prompt", "x" * 99, "generate.max_new_tokens=60"], "exceed the model's 64 positions"),
    ],
)
def test_bad_input(command, trained, arguments, needle):
    model = str(trained / "run" / "model")
    done = command("generate", *[model if argument == "MODEL" else argument for argument in arguments])
    assert done.code == 2 and needle in done.err and "Traceback" not in done.err, done.err


@pytest.mark.parametrize(
    "sampling", [{"top_k": 5, "top_p": 1.0}, {"top_k": 0, "top_p": 0.6}, {"top_k": 50, "top_p": 0.95}]
)
def test_text_by_whole_passes_is_drawn_from_what_transformers_would_draw_from(model, sampling):
    """The same tokens are left, with the same probabilities."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    settings = GenerateConfig(temperature=0.7, **sampling)
    logits = model(torch.arange(12)[None]).logits[:, -1].float().detach()
    theirs = TemperatureLogitsWarper(0.7)(None, logits.clone())
    theirs = TopKLogitsWarper(sampling["top_k"])(None, theirs) if sampling["top_k"] else theirs
    theirs = TopPLogitsWarper(sampling["top_p"])(None, theirs)
    ours = _likely(logits / settings.temperature, settings)
    assert torch.equal(ours.isinf(), theirs.isinf()) and not ours.isinf().all()
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


def test_whole_passes_and_a_cache_find_the_same_text(model):
    """And end at the end of text, unless the other ranks have to go on."""
    settings = GenerateConfig(do_sample=False, max_new_tokens=6)
    ids = torch.tensor([[5, 6, 7]])
    cached = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    found = by_passes(model, ids, settings, None)
    assert found.tolist() == cached.tolist()
    last = found[0, 4].item()
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    assert by_passes(model, ids, settings, last).tolist() == found[:, : found[0].tolist().index(last) + 1].tolist()
    alone, _ = len(passes), passes.clear()
    together = by_passes(model, ids, settings, last, together=True)
    assert together.tolist() == found[:, : found[0].tolist().index(last) + 1].tolist() and len(passes) == 6 > alone
    handle.remove()


def test_a_reformer_goes_on_past_its_chunk_without_a_padding_token():
    """Its last chunk is filled up, and masked: the next token is that of the whole text."""
    config = ModelConfig(type="reformer", preset="tiny", config={"local_attn_chunk_length": 16})
    plain = model_configuration(
        config, {"vocab_size": 60, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    )
    assert plain.pad_token_id is None
    reformer = build_model(config, plain, 0).eval()
    found = by_passes(reformer, torch.tensor([[5, 6, 7]]), GenerateConfig(do_sample=False, max_new_tokens=34), None)
    assert found.shape == (1, 37)
    with torch.no_grad():
        whole = reformer(input_ids=torch.cat((found, torch.full((1, 11), 9)), 1)).logits  # three chunks, none in part
    assert found[0, 1:].tolist()[2:] == whole[0, 2:36].argmax(-1).tolist()


def test_a_prompt_with_the_padding_of_a_model_that_looks_for_it_is_refused(tokenizer):
    padding = tokenizer("the cat", add_special_tokens=False)["input_ids"][-1]
    config = ModelConfig(type="roberta", preset="tiny", config={"pad_token_id": padding})
    roberta = build_model(
        config, model_configuration(config, {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}), 0
    )
    settings = GenerateConfig(max_new_tokens=2)
    with pytest.raises(
        UserError, match=rf"the prompt holds '.*' \(id {padding}\), which roberta takes for padding wherever"
    ):
        generate(roberta, tokenizer, "the cat", settings, 0)
    assert generate(roberta, tokenizer, "x", settings, 0).startswith("x")
