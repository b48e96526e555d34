"""The model card: what it says is what was measured, and the Hub's own tools read it."""

import pytest
from conftest import recipe_values
from huggingface_hub import ModelCard

from clm_dist import recipe
from clm_dist.config import ModelConfig
from clm_dist.model.configuration import away_from_home, model_configuration
from clm_dist.publish.card import launch_line, model_card, public_values
from clm_dist.publish.footprint import energy, training_hours, watts

FIGURES = {
    "eval/loss": 1.5,
    "eval/perplexity": 4.481689,
    "eval/bits_per_byte": 0.75,
    "eval/accuracy": 0.4321,
    "eval/tokens": 900,
    "step": 20,
    "arithmetic": "2 processes x 3",
    "parameters": 12345,
    "tokens_seen": 3840,
    "engine": "DDP",
    "away": [],
}
ENVIRONMENT = {
    "device": "NVIDIA H100 80GB HBM3",
    "machine": "Linux x86_64, 64 cores",
    "processes": 2,
    "commit": "abc123",
    "versions": {"clm-dist": "0.1", "torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1.15.0"},
}
PREPARED = {
    "tokenizer": "openai-community/gpt2",
    "hub_ids": ["owner/questions"],
    "train": {"documents": 1000, "tokens": 50_000},
}
ROWS = [{"step": 10, "perf/seconds_per_step": 900.0}, {"step": 10}, {"step": 20, "perf/seconds_per_step": 540.0}]


@pytest.fixture
def config(tmp_path):
    values = recipe_values(tmp_path, data={"source": "owner/questions"}, publish={"license": "apache-2.0"})
    values["model"] = {"name": "distilbert/distilgpt2"}
    return recipe.build(values)


def card(config, **changed):
    return model_card(config, {**FIGURES, **changed}, ENVIRONMENT, PREPARED, ROWS, "c0ffee")


def test_its_metadata_is_what_the_hub_reads(config):
    data = ModelCard(card(config)).data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", "en", "transformers")
    assert (data.pipeline_tag, data.base_model) == ("text-generation", "distilbert/distilgpt2")
    assert data.datasets == ["owner/questions"]
    assert data.model_name == "run"
    found = {one.metric_type: one.metric_value for one in data.eval_results}
    assert found == {"perplexity": 4.481689, "loss": 1.5, "bits_per_byte": 0.75, "accuracy": 0.4321}
    assert {(one.task_type, one.dataset_type) for one in data.eval_results} == {("text-generation", "owner/questions")}


def test_it_says_what_was_done_and_leaves_room_for_what_only_people_know(config, tmp_path):
    text = card(config)
    for needle in (
        "from distilbert/distilgpt2 at commit `c0ffee`",
        "tokens seen: 3,840, in 20 steps",
        "on NVIDIA H100 80GB HBM3 (Linux x86_64, 64 cores), 2 processes, DDP",
        "![Loss of training and of held-out text](curves.png)",
        "clm-dist prepare recipe.yaml\naccelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2",
        "## Intended use\n\n[More information needed",
        "## Limits\n\n[More information needed",
        # by hand: 10 steps of 900 s and 10 of 540 s are 4 h; 2 GPUs of 700 W: 5.6 kWh
        "at most 2 x 700 W x 4.00 h = 5.6 kWh",
    ):
        assert needle in text, needle
    assert str(tmp_path) not in text


def test_without_an_evaluation_or_known_hardware_it_claims_nothing(config):
    figures = {key: value for key, value in FIGURES.items() if not key.startswith("eval/")}
    text = model_card(config, figures, {**ENVIRONMENT, "device": "cpu"}, PREPARED, ROWS)
    assert ModelCard(text).data.eval_results is None
    assert "nothing was evaluated at this step" in text and "kWh" not in text


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 400),
        ("NVIDIA A100 80GB PCIe", 300),
        ("NVIDIA L4", 72),
        ("NVIDIA L40S", 350),
        ("Tesla V100-SXM2-16GB", 300),
        ("NVIDIA GeForce RTX 4090", 450),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("cpu", None),
    ],
)
def test_power_only_of_what_is_known(device, expected):
    assert watts(device) == expected


def test_energy_needs_a_time():
    assert training_hours([]) == 0 and energy("NVIDIA L4", 1, []) is None


def test_the_command_that_trains_again():
    assert launch_line(1, "one process") == "clm-dist train recipe.yaml"
    assert "accelerate_configs/zero3.yaml --num_processes 8" in launch_line(8, "ZeRO-3")
    assert "accelerate_configs/fsdp2.yaml" in launch_line(4, "FSDP2")


def test_no_place_of_the_machine_in_a_public_recipe():
    values = {"run_dir": "/home/me/run", "data": {"source": ["/data/a.txt", "b/c.txt", "owner/name"]}, "seed": 1}
    assert public_values(values) == {
        "run_dir": "run",
        "data": {"source": ["a.txt", "b/c.txt", "owner/name"]},
        "seed": 1,
    }


def test_it_says_what_transformers_alone_computes_otherwise(config):
    """ProphetNet's code is mended in training; the card shows no `pipeline` that would run the library's."""
    built = model_configuration(ModelConfig(type="prophetnet", preset="tiny"), {"vocab_size": 60})
    text = card(config, away=away_from_home(built))
    assert "The code of transformers for ProphetNet was mended in training" in text and "pipeline(" not in text
    assert away_from_home(model_configuration(ModelConfig(type="gpt2", preset="tiny"), {"vocab_size": 60})) == []
    assert "pipeline(" in card(config)
