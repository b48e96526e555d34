"""Recipes: read, overridden, refused with every reason at once, and written back whole."""

from pathlib import Path

import pytest
from conftest import ROOT, recipe_values, write_recipe

from clm_dist import recipe
from clm_dist.errors import ConfigError, UserError


def problems(values, *overrides, tmp_path=None):
    path = write_recipe(tmp_path / "r.yaml", values)
    with pytest.raises(ConfigError) as caught:
        recipe.load(path, list(overrides))
    return caught.value.problems


def test_every_shipped_recipe_loads():
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert {path.stem for path in recipes} >= {"demo", "eli5_distilgpt2"}
    for path in recipes:
        recipe.load(path, [])


def test_the_guides_own_job():
    """The numbers of the causal-LM guide."""
    config = recipe.load(ROOT / "recipes" / "eli5_distilgpt2.yaml", [])
    assert (config.model.name, config.data.source) == ("distilbert/distilgpt2", "dany0407/eli5_category")
    assert (config.data.block_size, config.data.eval_fraction, config.data.append_eos) == (128, 0.2, False)
    assert (config.optim.lr, config.optim.weight_decay, config.train.epochs) == (2e-5, 0.01, 3)
    assert config.evaluate.every_steps is None  # each epoch
    assert config.generate.prompts == ("Somatic hypermutation allows the immune system to",)
    assert (config.generate.do_sample, config.generate.top_k, config.generate.top_p) == (True, 50, 0.95)


def test_what_is_written_reads_back_equal(tmp_path):
    config = recipe.build(recipe_values(tmp_path, generate={"prompts": ["Übung", "a: b"]}))
    (tmp_path / "again.yaml").write_text(recipe.dump(config), encoding="utf-8")
    assert recipe.load(tmp_path / "again.yaml", []) == config


def test_overrides(tmp_path):
    path = write_recipe(tmp_path / "r.yaml", recipe_values(tmp_path))
    config = recipe.load(
        path,
        [
            "data.block_size=32",
            "optim.lr=2e-5",  # YAML 1.1 would make text of it
            "data.text_separator= ",  # a space is a space
            "model.config.n_layer=3",
            "generate.prompts=[a, b]",
            "optim.max_grad_norm=null",
            "data.revision=1234",  # text stays text
        ],
    )
    assert config.data.block_size == 32
    assert config.optim.lr == 2e-5
    assert config.data.text_separator == " "
    assert config.model.config["n_layer"] == 3 and config.model.config["n_embd"] == 32
    assert config.generate.prompts == ("a", "b")
    assert config.optim.max_grad_norm is None
    assert config.data.revision == "1234"


def test_all_problems_at_once_with_the_nearest_names(tmp_path):
    values = recipe_values(tmp_path, data={"blok_size": 3, "block_size": 1}, train={"lr": 3, "max_steps": "many"})
    values["otpim"] = {}
    values["data"].pop("source")
    found = "\n".join(problems(values, "optim.schedule=cosin", "nonsense", tmp_path=tmp_path))
    for needle in (
        "unknown key data.blok_size; did you mean data.block_size?",
        "data.block_size=1: input should be greater than or equal to 2",
        "data.source is missing; set it",
        "unknown key train.lr; did you mean optim.lr?",
        "train.max_steps='many'",
        "unknown key otpim; did you mean optim?",
        "optim.schedule='cosin': input should be 'linear', 'cosine', 'constant' or 'wsd'",
        "nonsense is not an override; write section.field=value",
    ):
        assert needle in found, found


@pytest.mark.parametrize(
    ("sections", "needle"),
    [
        ({"model": {"name": "gpt2"}}, "set one of them: a name to load, or a type to build from scratch"),
        ({"model": {"from_scratch": True}}, "model.from_scratch=true needs model.name"),
        ({"data": {"tokenizer": "x"}}, "data.tokenizer=x would be loaded and data.tokenizer_vocab_size=300 trained"),
        ({"data": {"tokenizer_vocab_size": None}}, "no tokenizer: set data.tokenizer"),
        ({"data": {"eval_split": "test"}}, "data.eval_split=test and data.eval_fraction=0.2 are given"),
        ({"data": {"eval_fraction": None}}, "data.eval_split=None and data.eval_fraction=None"),
        ({"data": {"eval_split": "train", "eval_fraction": None}}, "evaluate on other text"),
        ({"train": {"epochs": 1}}, "train.epochs=1.0 and train.max_steps=6 are given"),
        ({"train": {"micro_batch_size": 5}}, "set a micro_batch_size among 1, 2, 3, 4, 6, 12"),
        ({"optim": {"schedule": "wsd"}}, "decay_steps is for wsd, which needs it"),
        ({"train": {"activation_checkpointing": "some"}}, "needs true, false or selective"),
        ({"train": {"activation_checkpointing": "selective", "compile": "on"}}, "set train.compile=off, or"),
        ({"optim": {"decay_steps": 3}}, "decay_steps is for wsd"),
        (
            {"optim": {"warmup_steps": 7}},
            "=7 does not fit into train.max_steps=6; set optim.warmup_steps to 6 or less, or train",
        ),
        ({"train": {"profile_steps": [3, 2]}}, "train.profile_steps=[3, 2] are no steps of this run"),
        ({"train": {"profile_steps": [7, 9]}}, "the first and the last one, between 1 and 6"),
    ],
)
def test_fields_that_disagree(tmp_path, sections, needle):
    with pytest.raises(ConfigError) as caught:
        recipe.build(recipe_values(tmp_path, **sections))
    assert needle in str(caught.value)


def test_a_wrong_value_does_not_hide_a_disagreement(tmp_path):
    values = recipe_values(tmp_path, data={"block_size": 0}, train={"epochs": 2})
    found = "\n".join(problems(values, tmp_path=tmp_path))
    assert "data.block_size=0" in found and "train.epochs=2.0 and train.max_steps=6" in found


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("a: [1", "is not valid YAML"),
        ("- a\n- b", "holds list, not sections"),
        ("", "holds NoneType, not sections"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, needle):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=needle):
        recipe.load(tmp_path / "r.yaml", [])


def test_a_missing_recipe_names_its_neighbour(tmp_path):
    write_recipe(tmp_path / "demo.yaml", {})
    with pytest.raises(UserError, match=r"no recipe at .*demo2.yaml; did you mean .*demo.yaml\?"):
        recipe.load(tmp_path / "demo2.yaml", [])


def test_an_empty_section_is_its_defaults(tmp_path):
    values = {**recipe_values(tmp_path), "optim": None, "track": None}
    config = recipe.load(write_recipe(tmp_path / "r.yaml", values), ["optim.lr=1"])
    assert (config.optim.lr, config.optim.beta1, config.track.trackers) == (1.0, 0.9, ())


@pytest.mark.parametrize("value", ["no", "bf16"])
def test_no_is_a_word(tmp_path, value):
    """YAML 1.1 reads a bare `no` as false, in a recipe and on the command line."""
    (tmp_path / "r.yaml").write_text(
        recipe.dump(recipe.build(recipe_values(tmp_path, train={"mixed_precision": "no"}))).replace("'no'", "no")
    )
    config = recipe.load(tmp_path / "r.yaml", [f"train.mixed_precision={value}"])
    assert config.train.mixed_precision == value
    assert recipe.load(tmp_path / "r.yaml", []).train.mixed_precision == "no"


def test_home_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    config = recipe.load(
        write_recipe(tmp_path / "r.yaml", recipe_values(tmp_path)), ["run_dir=~/run", "data.prepared_dir=~/p"]
    )
    assert (config.run_dir, config.data.prepared_dir) == ("/somewhere/run", "/somewhere/p")


def test_the_tree_is_frozen(tmp_path):
    config = recipe.build(recipe_values(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.data.block_size = 3


def test_every_field_says_what_it_is():
    for name, field in recipe.leaves():
        assert field.description and field.description.endswith("."), name


def test_help_names_every_field_with_its_range():
    text = recipe.help_text()
    assert "data.block_size  (int, >= 2, default 128)" in text
    assert "optim.schedule  (linear | cosine | constant | wsd, default 'linear')" in text
    assert "run_dir  (str, required)" in text
    assert "train.epochs  (float | null, > 0, default None)" in text
    assert all(f"  {name}  (" in text for name, _ in recipe.leaves())


def test_every_field_is_used_somewhere():
    """No option that nothing uses."""
    code = "\n".join(
        p.read_text() for p in Path(recipe.__file__).parent.rglob("*.py") if p.name not in ("config.py", "recipe.py")
    )
    templates = "\n".join(p.read_text() for p in Path(recipe.__file__).parent.rglob("*.j2"))
    for name, _ in recipe.leaves():
        field = name.split(".")[-1]
        assert f".{field}" in code + templates or f'"{field}"' in code, name


def test_yaml_is_read_safely(tmp_path):
    (tmp_path / "r.yaml").write_text("run_dir: !!python/object/apply:os.getcwd []")
    with pytest.raises(UserError, match="is not valid YAML"):
        recipe.load(tmp_path / "r.yaml", [])


def test_a_models_own_numbers_are_numbers(tmp_path):
    """YAML 1.1 makes text of 1e-5; a field's type mends that, model.config has none."""
    path = write_recipe(tmp_path / "r.yaml", recipe_values(tmp_path))
    config = recipe.load(path, ["model.config.layer_norm_epsilon=1e-6", "data.revision=None"])
    assert config.model.config["layer_norm_epsilon"] == 1e-6
    assert config.data.revision is None


def test_a_missing_section_does_not_hide_the_rest(tmp_path):
    values = recipe_values(tmp_path, optim={"warmup_steps": 70})
    del values["model"], values["data"]["source"]
    found = problems(values, tmp_path=tmp_path)
    assert any(text.startswith("model is missing") for text in found)
    assert any(text.startswith("data.source is missing") for text in found)
    assert any("does not fit into train.max_steps=6" in text for text in found)
