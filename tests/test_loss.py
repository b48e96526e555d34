"""The loss, against a formula written out by hand."""

import math

import pytest
import torch

from clm_dist.model.loss import next_token_nll


def test_by_hand():
    """Two tokens of a vocabulary of two, logits (0, ln 3): probabilities 1/4 and 3/4."""
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, math.log(3.0)], [9.0, 9.0]]])  # (1, 3, 2)
    nll = next_token_nll(logits, torch.tensor([[0, 1, 0]]))
    # position 0 predicts token 1 (p = 3/4), position 1 predicts token 0 (p = 1/4); the last predicts nothing
    assert nll[0].tolist() == pytest.approx([-math.log(0.75), -math.log(0.25)])


def test_a_long_hand_formula():
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 7, 11, dtype=torch.float64), torch.randint(0, 11, (3, 7))
    nll = next_token_nll(logits, ids)
    assert nll.shape == (3, 6)
    for b in range(3):
        for t in range(6):
            row = [math.exp(x) for x in logits[b, t].tolist()]
            expected = -math.log(row[ids[b, t + 1]] / sum(row))
            assert nll[b, t].item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_logits_are_summed_in_single():
    logits = torch.randn(2, 5, 100).bfloat16()
    nll = next_token_nll(logits, torch.randint(0, 100, (2, 5)))
    assert nll.dtype == torch.float32


def test_it_is_what_gpt2_itself_computes():
    """Where a model's own loss is right, ours is equal."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=16, vocab_size=50)).eval()
    ids = torch.randint(0, 50, (4, 16))
    output = model(input_ids=ids, labels=ids)
    assert next_token_nll(output.logits, ids).mean().item() == pytest.approx(output.loss.item(), rel=1e-6)


def test_what_is_not_scored_is_zero_and_has_no_gradient():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 11, requires_grad=True), torch.randint(0, 11, (2, 5))
    scored = torch.tensor([[True, False, True, True], [False, True, True, False]])
    nll = next_token_nll(logits, ids, scored)
    assert torch.equal(nll, next_token_nll(logits, ids) * scored)
    nll.sum().backward()
    assert (logits.grad[:, :-1].abs().sum(-1) > 0).tolist() == scored.tolist()
