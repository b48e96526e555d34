"""The loss by chunks against plain autograd, in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from clm_dist.model import chunks, kernels
from clm_dist.model.chunks import Output, each_nll, summed_nll
from clm_dist.model.kernels import IGNORED

KERNELS = {"cpu": kernels.in_slices, "gpu": kernels.at_once(kernels.by_formula)}
MAPS = {"plain": (1.0, None), "scaled": (0.25, None), "capped": (1.0, 3.0)}


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Both ways to compute a chunk, of which there are several, the last one shorter; so of the slices of words."""
    monkeypatch.setattr(chunks, "_learner", lambda device: KERNELS[request.param])
    monkeypatch.setattr(kernels, "WIDTH", 30)
    monkeypatch.setattr(chunks, "ELEMENTS_ON_CPU", 101 * 16)


def inputs(bias, dtype=torch.float32):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 12, dtype=dtype), torch.randn(101, 12, dtype=dtype)
    targets = torch.randint(101, (37,))
    targets[[0, 5, 36]] = IGNORED
    return [hidden, weight, torch.randn(101, dtype=dtype) if bias else None], targets


def whole(hidden, weight, bias, targets, scale, cap):
    logits = F.linear(hidden, weight, bias) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("how", MAPS)
def test_loss_and_gradients_are_those_of_autograd(kernel, how, bias):
    tensors, targets = inputs(bias)
    ours = [None if one is None else one.clone().requires_grad_() for one in tensors]
    exact = [None if one is None else one.double().requires_grad_() for one in tensors]
    loss, wanted = summed_nll(ours[0], Output(*ours[1:], *MAPS[how]), targets), whole(*exact, targets, *MAPS[how])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    (loss * 0.37).backward()
    (wanted * 0.37).backward()
    for mine, other in zip(ours, exact, strict=True):
        if mine is not None:
            assert (mine.grad - other.grad).abs().max() <= 1e-6 * other.grad.abs().max()


@pytest.mark.parametrize("how", MAPS)
def test_each_token(kernel, how):
    tensors, targets = inputs(True)
    nll, correct = each_nll(tensors[0], Output(*tensors[1:], *MAPS[how]), targets)
    for place in (1, 20, 35):
        one = whole(*(tensor.double() for tensor in (tensors[0][[place]], *tensors[1:])), targets[[place]], *MAPS[how])
        assert nll[place].item() == pytest.approx(one.item(), rel=1e-5)
    likeliest = F.linear(*tensors).argmax(-1)
    assert nll[[0, 5, 36]].tolist() == [0, 0, 0]
    assert correct.equal(likeliest == targets)


def test_by_hand(kernel):
    """One token, two words with logits 0 and ln 3: the second has probability 3/4."""
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[0.0], [math.log(3.0)]], requires_grad=True)
    loss = summed_nll(hidden, Output(weight), torch.tensor([1]))
    assert loss.item() == pytest.approx(-math.log(0.75))
    loss.backward()
    assert weight.grad.flatten().tolist() == pytest.approx([0.25, -0.25])  # p - 1 where it was right
    assert hidden.grad.item() == pytest.approx(-0.25 * math.log(3.0))


def test_a_target_without_a_chance_has_a_finite_loss(kernel):
    """Its probability is 0 in fp32, and its loss 200 nats."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [200.0]])
    assert summed_nll(hidden, Output(weight), torch.tensor([0])).item() == pytest.approx(200.0)


def test_infinite_logits_are_not_hidden(kernel):
    hidden, weight = torch.tensor([[1.0], [3e38]]), torch.tensor([[1.0], [9.0]])
    assert not math.isfinite(summed_nll(hidden, Output(weight), torch.tensor([0, 1])).item())


def test_nothing_is_computed_for_what_is_frozen(kernel):
    """A head beside adapters: no gradient of its weights, which are the largest of all."""
    [hidden, weight, _], targets = inputs(False)
    hidden.requires_grad_()
    loss = summed_nll(hidden, Output(weight), targets)
    assert [one is None for one in loss.grad_fn.saved_tensors] == [False, True, True]
    loss.backward()
    assert hidden.grad is not None and weight.grad is None


def test_under_autocast_sums_are_in_single_precision(kernel):
    tensors, targets = inputs(True)
    ours = [one.clone().requires_grad_() for one in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = summed_nll(ours[0], Output(*ours[1:]), targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(whole(*tensors, targets, 1.0, None).item(), rel=1e-2)
    assert [one.grad.dtype for one in ours] == [torch.float32] * 3


def test_in_16_bits_slices_are_summed_in_single_precision(monkeypatch):
    """Of a hundred slices: 0.0036 off, where sums in bf16 would be 0.015."""
    monkeypatch.setattr(kernels, "WIDTH", 30)
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 12).bfloat16(), torch.randn(3000, 12).bfloat16()
    targets = torch.randint(3000, (37,))
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    summed_nll(ours, Output(weight), targets).backward()
    whole(exact, weight.double(), None, targets, 1.0, None).backward()
    assert (ours.grad.double() - exact.grad).norm() <= 0.006 * exact.grad.norm()


def test_the_logits_are_never_whole():
    """Of 4,096 tokens and a vocabulary of 8,192: 134 MB of logits, of which a chunk holds a quarter at most."""
    from clm_dist.planning.activations import Meter

    hidden, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(8192, 8, requires_grad=True)
    with Meter() as meter:
        summed_nll(hidden, Output(weight), torch.randint(8192, (4096,))).backward()
    assert max(meter.history) < 4096 * 8192 * 4 / 1.5


def test_a_tied_embedding_takes_no_third_gradient():
    """Autograd adds the embedding's to the head's in place, which it does only where nothing else holds that."""
    weight, ids = torch.randn(512, 8, requires_grad=True), torch.randint(512, (8,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        summed_nll(F.embedding(ids, weight), Output(weight), ids).backward()
    of_weights = {event.name for event in profile.events() if list(weight.shape) in event.input_shapes[:1]}
    assert "aten::add_" in of_weights and "aten::add" not in of_weights


@pytest.mark.parametrize("tokens, vocabulary", [(1, 50257), (8192, 50257), (1023, 300), (1000, 2**25)])
def test_chunks_cover_all_tokens_once(tokens, vocabulary):
    slices = list(chunks._chunks(tokens, vocabulary, torch.device("cpu")))
    assert [i for one in slices for i in range(one.start, one.stop)] == list(range(tokens))
    assert all((one.stop - one.start) * vocabulary <= max(chunks.ELEMENTS_ON_CPU, vocabulary) for one in slices)
