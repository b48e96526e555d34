"""What a launch asks for, by its variables: which engine, and every reason why not."""

import pytest
import torch
from conftest import ROOT, recipe_values, run_command

from clm_dist import recipe
from clm_dist.errors import ConfigError
from clm_dist.model.build import build_model
from clm_dist.model.checkpointing import checkpoint_activations
from clm_dist.model.configuration import model_configuration
from clm_dist.training.plan import make_plan
from clm_dist.training.sharding import sharding

LAUNCHER = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "CLM_DIST_DEEPSPEED", "WORLD_SIZE")


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """ask(precision, VARIABLE=value) -> Sharding."""
    monkeypatch.chdir(ROOT)
    for name in (*LAUNCHER, "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)

    def asked(precision="no", **variables):
        config = recipe.build(recipe_values(tmp_path, train={"mixed_precision": precision}))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return sharding(config, make_plan(config, 100, 2), model_configuration(config.model, {"vocab_size": 300}))

    return asked


def test_no_launcher_asks_for_nothing(ask):
    found = ask()
    assert (found.kind, found.settings, found.lines()) == ("replicated", None, [])


def test_a_file_is_resolved(ask):
    found = ask(CLM_DIST_DEEPSPEED="ds_configs/zero2.json", WORLD_SIZE="2")
    assert found.kind == "zero" and found.settings["train_micro_batch_size_per_gpu"] == 6
    assert '"auto"' not in str(found.settings)
    assert "ds_configs/zero2.json: gradient_clipping = 1.0 (optim.max_grad_norm=1.0)" in found.lines()
    assert any(line.endswith("= 1024 (hidden size 32 squared)") for line in found.lines())


def test_all_that_is_wrong_at_once(ask, tmp_path):
    """With the launcher, with the file, and with the precision."""
    file = tmp_path / "bad.json"
    file.write_text('{"gradient_clipping": 0.5, "zero_optimization": {"stage": 2, "reduce_buket_size": 5}}')
    with pytest.raises(ConfigError) as caught:
        ask("fp8", CLM_DIST_DEEPSPEED=str(file))
    text = str(caught.value)
    assert "gradient_clipping=0.5 but optim.max_grad_norm=1.0" in text and "did you mean reduce_bucket_size" in text
    assert "DeepSpeed needs a launcher" in text and "fp8 is not supported under DeepSpeed" in text


def test_fsdp(ask):
    assert ask(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", WORLD_SIZE="2").kind == "fsdp2"
    with pytest.raises(ConfigError) as caught:
        ask("fp16", FSDP_VERSION="1")
    assert "FSDP version 1, which is not supported; set fsdp_version: 2" in str(caught.value)
    assert "fp16 is not supported under FSDP2; set bf16 or no" in str(caught.value)


def test_what_an_fsdp_section_asks_for_in_vain(ask):
    """All of it at once; what Accelerate puts there of itself is let pass."""
    usual = {
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}
    assert ask(**fsdp, **usual).kind == "fsdp2"
    with pytest.raises(ConfigError) as caught:
        ask(FSDP_OFFLOAD_PARAMS="true", FSDP_ACTIVATION_CHECKPOINTING="true", FSDP_AUTO_WRAP_POLICY="SIZE_BASED_WRAP")
    needles = [
        "fsdp_offload_params=true",
        "fsdp_activation_checkpointing=true",
        "fsdp_auto_wrap_policy=SIZE_BASED_WRAP",
    ]
    assert len(caught.value.problems) == 3 and all(needle in str(caught.value) for needle in needles)


def test_a_sharding_engine_needs_a_launcher(ask):
    with pytest.raises(ConfigError, match="FSDP2 needs a launcher, for one process too"):
        ask(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")


def test_activations_computed_again_give_the_same_gradients(tmp_path):
    """With dropout; and less is kept for the backward pass."""
    gradients, kept = {}, {}
    for again in (False, True, "selective"):
        gradients[again], kept[again] = _one_pass(recipe.build(recipe_values(tmp_path)), again)
        assert all(torch.equal(one, other) for one, other in zip(gradients[False], gradients[again], strict=True))
    assert kept[True] < 0.7 * kept[False]


def _one_pass(config, again):
    """Gradients of a small model with dropout, and the bytes that its forward pass keeps."""
    built = model_configuration(config.model, {"vocab_size": 300})
    built.resid_pdrop = 0.1
    model = build_model(config.model, built, 1).train()
    model.config.use_cache = False
    checkpoint_activations(model, again)
    kept = []

    def keep(tensor):
        kept.append(tensor.nbytes)
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=torch.arange(32).view(2, 16)).logits.float().logsumexp(-1).sum()
    total = sum(kept)
    loss.backward()
    return [parameter.grad for parameter in model.parameters()], total


def test_the_launchers_own_argument_is_passed_over(tmp_path):
    """DeepSpeed's launcher adds --local_rank=N; without a launcher it is as unknown as ever."""
    recipe_file = ROOT / "recipes" / "demo.yaml"
    arguments = ("check", "--local_rank=0", recipe_file, f"data.prepared_dir={tmp_path / 'none'}")
    launched = run_command(*arguments, env={"LOCAL_RANK": "0"})
    assert launched.code == 2 and "local_rank" not in launched.err and "prepare" in launched.err
    alone = run_command(*arguments)
    assert alone.code == 2 and "unknown argument --local_rank" in alone.err
