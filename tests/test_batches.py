"""What the model is given: padding is not scored, documents do not see each other when that is asked for."""

import numpy as np
import pytest
import torch
from conftest import recipe_values, run_command, write_documents, write_recipe
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from clm_dist.data.blocks import Blocks, BlockWriter
from clm_dist.errors import UserError
from clm_dist.model.isolation import check_isolation
from clm_dist.model.loss import next_token_nll
from clm_dist.training.batches import Batches

CPU = torch.device("cpu")


@pytest.fixture
def blocks(tmp_path):
    """Two blocks of six: documents of 2 and 3 tokens and one of padding; a document of 6."""
    writer = BlockWriter(tmp_path / "train", 6, np.dtype(np.uint16), "train")
    rows = np.array([[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 10, 11]], dtype=np.uint16)
    writer.write(rows, np.array([0, 2, 6]), np.array([5, 6], dtype=np.uint32))
    writer.close()
    return Blocks(tmp_path / "train")


def test_padding_is_not_scored(blocks):
    batches = Batches(blocks, False, CPU)
    batch = batches.batch([0, 1])
    assert batch.scored.tolist() == [[True, True, True, True, False], [True] * 5]
    assert batches.count([0, 1]) == 9 and batches.count([0]) == 4
    assert batch.position_ids is None


def test_isolated_documents(blocks):
    batches = Batches(blocks, True, CPU)
    batch = batches.batch([0, 1])
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert batch.scored.tolist() == [[True, False, True, True, False], [True] * 5]  # 3 cannot be foretold from 2
    assert batches.count([0, 1]) == 8


def test_isolated_documents_have_the_nll_they_have_alone(blocks):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 6, "vocab_size": 20, "use_cache": False}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    batch = Batches(blocks, True, CPU).batch([0])
    with torch.no_grad():
        packed = next_token_nll(model(**batch.inputs()).logits, batch.input_ids, batch.scored)
        alone = [torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5]])]
        nll = [next_token_nll(model(input_ids=ids).logits, ids).sum() for ids in alone]
        leaking = next_token_nll(model(input_ids=batch.input_ids).logits, batch.input_ids, batch.scored)
    assert packed.sum().item() == pytest.approx(sum(nll).item(), rel=1e-6)
    assert leaking.sum().item() != pytest.approx(sum(nll).item(), rel=1e-4)  # mutant: no positions given


def test_a_model_that_cannot_is_refused():
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 8, "vocab_size": 20, "use_cache": False}
    check_isolation(GPT2LMHeadModel(GPT2Config(**sizes)), 8, "gpt2")
    mamba = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20, use_cache=False))
    with pytest.raises(UserError, match=r"mamba lets a document see the one before it.*set it to false"):
        check_isolation(mamba, 8, "mamba")


def test_training_and_evaluation_on_packed_documents(tmp_path):
    """The whole way: best fit, isolated; what is scored is counted from the data by hand."""
    write_documents(tmp_path / "texts.jsonl")
    data = {"packing": "best_fit", "block_size": 32}
    train = {"isolate_documents": True, "max_steps": 20}
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(tmp_path, data=data, train=train))
    for command in ("prepare", "train", "evaluate"):
        done = run_command(command, recipe)
        assert done.code == 0, done.err
    blocks = Blocks(tmp_path / "prepared" / "eval")
    every = np.arange(len(blocks))
    assert blocks.num_padding > 0
    expected = int(blocks.used(every).sum()) - int(blocks.document_starts(every).sum())
    assert f"{expected:,} tokens" in done.out
