"""GELU as one operation: the same numbers and slopes where a model learns, the library's own bits elsewhere, less memory."""

import copy

import pytest
import torch
import transformers.activations
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.bloom.modeling_bloom import BloomGelu

from clm_dist.model.activation import WRITTEN_OUT, FusedGELU, fuse_gelu

CLASSES = [
    BloomGelu if name == "BloomGelu" else getattr(transformers.activations, name) for name in sorted(WRITTEN_OUT)
]


def gpt2(fused=False, **sizes):
    torch.manual_seed(3)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=24, n_layer=2, n_head=2, **still, **sizes))
    if fused:
        fuse_gelu(model)
    return model.train()


def fused(module):
    holder = torch.nn.Sequential(module)
    fuse_gelu(holder)
    return holder


@pytest.mark.parametrize("kind", CLASSES, ids=sorted(WRITTEN_OUT))
def test_the_same_function_and_slope(kind):
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 1e-30, 1e4, -1e4])]).double()
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    holder = fused(kind())
    written, by_kernel = kind()(one), holder(other)
    assert (written - by_kernel).abs().max() < 2e-9
    written.sum().backward()
    by_kernel.sum().backward()
    assert (one.grad - other.grad).abs().max() < 2e-8
    assert "Gelu" in type(by_kernel.grad_fn).__name__
    assert torch.equal(holder.eval()(x), kind().eval()(x))


def test_a_model_keeps_its_names_its_configuration_and_its_loss():
    written, kernel = gpt2(), gpt2(fused=True)
    assert all(type(block.mlp.act) is FusedGELU for block in kernel.transformer.h)
    assert list(written.state_dict()) == list(kernel.state_dict())
    assert kernel.config.to_dict() == written.config.to_dict()
    ids = torch.randint(0, 97, (3, 32))
    losses = [model(input_ids=ids, labels=ids).loss for model in (written, kernel)]
    assert abs(losses[0] - losses[1]).item() < 1e-6
    for loss in losses:
        loss.backward()
    for (name, one), (_, other) in zip(written.named_parameters(), kernel.named_parameters(), strict=True):
        assert (one.grad - other.grad).abs().max() < 1e-6, name
    with torch.no_grad():  # an evaluation is the library's to the last bit
        assert torch.equal(written.eval()(input_ids=ids).logits, kernel.eval()(input_ids=ids).logits)


def test_a_model_that_evaluates_does_so_still():
    """As transformers hands one over that it has loaded."""
    model = gpt2().eval()
    before = model(input_ids=torch.arange(32)[None]).logits
    fuse_gelu(model)
    assert torch.equal(model(input_ids=torch.arange(32)[None]).logits, before)
    again = copy.deepcopy(model)  # as an export does, and without a module more
    assert torch.equal(again(input_ids=torch.arange(32)[None]).logits, before)
    assert not list(again.transformer.h[0].mlp.act.children())


LEFT_ALONE = ["relu", "gelu", "gelu_pytorch_tanh", "gelu_python", "gelu_python_tanh", "silu", "quick_gelu"]


@pytest.mark.parametrize("function", LEFT_ALONE)
def test_other_functions_are_left_alone(function):
    model = gpt2(activation_function=function)
    before = list(model.modules())
    fuse_gelu(model)
    assert list(model.modules()) == before


def test_a_class_of_that_name_from_elsewhere_is_left_alone():
    class NewGELUActivation(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    assert fused(NewGELUActivation())(torch.ones(1)) == 2


def test_a_backward_pass_keeps_one_tensor_of_four():
    def kept(model):
        every = []
        with saved_tensors_hooks(lambda x: every.append(x) or x, lambda x: x):
            model(input_ids=torch.zeros(2, 32, dtype=torch.int64))
        return len({x.data_ptr() for x in every if x.shape[-1] == 96 and x.dim() > 1 and x.shape[0] != 24})

    # in each of two blocks the output beside it
    assert (kept(gpt2()), kept(gpt2(fused=True))) == (2 * (4 + 1), 2 * (1 + 1))
