"""Activations counted without contents, against what real micro-steps on the CPU keep."""

import pytest
import torch
from tiny_models import TINY, tiny_configuration
from transformers import AutoModelForCausalLM

from clm_dist.errors import UserError
from clm_dist.model import chunks
from clm_dist.model.activation import fuse_gelu
from clm_dist.model.checkpointing import checkpoint_activations
from clm_dist.model.kernels import at_once
from clm_dist.model.transformers_versions import MAJOR
from clm_dist.planning.activations import (
    GpuAutocast,
    Meter,
    count,
    formula,
    gpu_kernel,
    micro_step,
    simulate,
)
from clm_dist.planning.shapes import shapes_of

DRAWS = pytest.mark.skipif(MAJOR < 5, reason="OPT of transformers 4.57 draws which layers to leave out: not counted")
COUNTED = [pytest.param(name, marks=DRAWS) if name == "opt" else name for name in TINY]
B, T = 5, 32  # B is none of the two that are counted


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of the loss here too, by the tensors that a GPU takes for them."""
    for place in ("ELEMENTS_ON_CPU", "ELEMENTS_ON_GPU"):
        monkeypatch.setattr(chunks, place, 100 * 64)
    monkeypatch.setattr(chunks, "_learner", lambda _: at_once(gpu_kernel))


def without_dropout(name):
    built = tiny_configuration(name)
    for field in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "attention_dropout"):
        if hasattr(built, field):
            setattr(built, field, 0.0)
    return built


def builder(built):
    """As it is trained."""

    def build(dtype):
        model = written_out(built)(dtype)
        fuse_gelu(model)
        return model

    return build


def written_out(built):
    """With GELU as transformers writes it."""
    return lambda dtype: AutoModelForCausalLM.from_config(built, dtype=dtype)


def real_model(name, precision, checkpointing=False):
    torch.manual_seed(0)
    model = builder(without_dropout(name))(torch.bfloat16 if precision == "bf16" else torch.float32).train()
    checkpoint_activations(model, checkpointing, again=GpuAutocast)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model, torch.randint(2, 90, (B, T))


def saved_bytes(model, ids, precision):
    """Bytes of unique storages that autograd saves in a forward pass, those of parameters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"), GpuAutocast():
        logits = model(input_ids=ids, use_cache=False).logits
    saved.pop(logits.untyped_storage().data_ptr(), None)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("name", COUNTED)
def test_what_is_kept_is_what_autograd_saves(name, precision):
    measured = saved_bytes(*real_model(name, precision), precision)
    estimate = count(builder(without_dropout(name)), T, precision, False).kept.at(B)
    assert estimate == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("name", COUNTED)
def test_the_peak_is_that_of_the_live_tensors(name, precision, checkpointing, small_chunks):
    model, ids = real_model(name, precision, checkpointing)
    with Meter() as meter, GpuAutocast():
        measured = micro_step(model, ids, precision, meter)
    found = count(builder(without_dropout(name)), T, precision, checkpointing)
    assert found.kept.at(B) == pytest.approx(measured.kept, rel=0.02)
    assert found.peak.at(B) == pytest.approx(measured.peak, rel=0.02)
    with Meter() as meter, GpuAutocast():
        alone = micro_step(model, ids[:1], precision, meter)
    # as if there were a full chunk: two tensors of up to 64 tokens of the vocabulary, where there are 32
    assert 0.98 * alone.peak <= found.peak.at(1) <= alone.peak * 1.15 + 2 * 100 * 64 * 4


def test_the_meter_counts_each_storage_from_its_making_to_its_end():
    with Meter() as meter:
        x = torch.zeros(100)  # 400 bytes
        y = x[:50]  # a view
        z = x + 1
        assert (meter.alive, max(meter.history)) == (800, 800)
        del x
        assert meter.alive == 800  # the view keeps it
        del y
        assert (meter.alive, max(meter.history)) == (400, 800)
        del z
    assert (meter.alive, max(meter.history)) == (0, 800)


def mask_bytes(layers, t, width):
    """What 4.57 keeps for the backward pass of one sequence and 5 does not: each layer's T x T mask, as numbers to add."""
    return layers * t * t * width if MAJOR < 5 else 0


def test_dropout_is_counted_as_on_a_gpu():
    """One byte a mask and no T x T matrix: with dropout more is kept than without, but not by the square of T."""
    build = builder(tiny_configuration("gpt2"))
    on_gpu = [simulate(build, 1, t, "fp32").kept - mask_bytes(2, t, 4) for t in (18, 36)]
    on_cpu = [simulate(build, 1, t, "fp32", as_on_gpu=False).kept for t in (18, 36)]
    assert on_gpu[1] == pytest.approx(2 * on_gpu[0], rel=0.01)
    assert on_cpu[1] > 2.2 * on_cpu[0]
    plain = simulate(builder(without_dropout("gpt2")), 1, 36, "fp32").kept - mask_bytes(2, 36, 4)
    # three places a layer and the embeddings, each a byte for each of 36 x 33 elements and no more than an output besides
    assert plain + 5 * 36 * 33 <= on_gpu[1] <= plain + 5 * 36 * 33 * 5


# GiB that the allocator of an H100 held at most while 8 x 1,024 tokens a step were trained in bf16, with whole logits, GELU
# written out, no dropout and no accumulation, and bytes of the gradients (benchmarks/results/2026-11-26-gpu.md)
MEASURED = [
    ({"n_layer": 6}, 8.73, 81_912_576),
    ({}, 12.25, 124_439_808),
    ({"n_layer": 24, "n_embd": 1024, "n_head": 16}, 25.10, 354_823_168),
]


@pytest.mark.skipif(MAJOR < 5, reason="measured with transformers 5; 4.57 keeps a T x T mask a layer besides")
@pytest.mark.parametrize("config, measured, parameters", MEASURED)
def test_the_peak_on_a_gpu(config, measured, parameters):
    """Weights, two moments and activations: gradients are made when the logits, where the peak is, are gone again. 64 MiB
    are cuBLAS's workspace, which no tensor owns."""
    from transformers import GPT2Config

    built = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **config)
    peak = simulate(written_out(built), 8, 1024, "autocast", chunked=False).peak
    assert (12 * parameters + peak + 2**26) / 2**30 == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(("kind", "of_all", "of_selective"), [(written_out, 1 / 4, 0.6), (builder, 1 / 8, 0.75)])
def test_checkpointing_keeps_inputs_only(kind, of_all, of_selective):
    """Selective also what four products and attention give of GPT-2: ten numbers a position and channel."""
    built = without_dropout("gpt2")
    plain, selective, full = (simulate(kind(built), 16, T, "fp32", one).kept for one in (False, "selective", True))
    assert full < of_all * plain and full < selective < of_selective * plain
    numbers = (selective - full) / (4 * 16 * T * built.n_embd * built.n_layer)
    assert 10 <= numbers < 10 + 2 * built.n_head / built.n_embd  # and of attention a number for each position and head


def test_the_formula_is_near_for_a_gpt():
    """GPT-2 XL's layer in 16 bits, which the formula was made for (34 bytes a position and channel)."""
    from transformers import CONFIG_MAPPING

    built = CONFIG_MAPPING["gpt2"](n_layer=4, n_embd=1600, n_head=25, vocab_size=50257)
    with torch.device("meta"):
        shapes = shapes_of(AutoModelForCausalLM.from_config(built))
    by_formula = formula(shapes, 50257, 1024, "bf16", False)
    counted = count(builder(built), 1024, "bf16", False)
    assert not by_formula.counted and counted.counted
    assert by_formula.kept.at(8) == 8 * 4 * 34 * 1024 * 1600
    assert by_formula.kept.at(8) < counted.kept.at(8) < 1.1 * by_formula.kept.at(8)
    logits = [found.peak.at(8) - found.kept.at(8) for found in (by_formula, counted)]
    assert logits[0] == pytest.approx(logits[1], rel=0.15)


def test_a_model_without_checkpointing_says_so():
    model, _ = real_model("gpt2", "fp32")
    type(model).supports_gradient_checkpointing, kept = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(UserError, match="cannot compute activations again"):
            simulate(lambda dtype: model, B, T, "fp32", True)
    finally:
        type(model).supports_gradient_checkpointing = kept
