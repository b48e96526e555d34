"""On a GPU: a micro-step that is recorded as a CUDA graph gives the bits of one that is launched kernel by kernel."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from clm_dist.config.learning import ModelConfig, OptimConfig, TrainConfig
from clm_dist.engine import captured
from clm_dist.engine.make import make_engine
from clm_dist.model.build import build_model
from clm_dist.model.compiled import compile_if_asked
from clm_dist.model.configuration import model_configuration
from clm_dist.model.objective import find_objective
from clm_dist.model.transformers_versions import without_looking_at_batches
from clm_dist.training.determinism import reserve_workspace, same_bits
from clm_dist.training.optimizer import make_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

B, T, VOCABULARY = 4, 128, 5003  # odd, so that the head's matrix is made longer
MODELS = {
    "gpt2": {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 256},  # with dropout
    "llama": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    "bloom": {"hidden_size": 128, "n_layer": 2, "n_head": 4},
}


def trained(kind, precision, compile_, cuda_graph):
    """Losses and gradient norms of six updates of two micro-steps, the weights after them, and what was said."""
    AcceleratorState._reset_state(True)
    torch._dynamo.reset()
    reserve_workspace()
    accelerator = Accelerator(mixed_precision=precision)
    ends = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    given = ModelConfig(type=kind, config={**MODELS[kind], **ends})
    model = build_model(given, model_configuration(given, {}), seed=0)
    model.config.use_cache = False
    objective = find_objective(model)
    train = TrainConfig(max_steps=6, cuda_graph=cuda_graph, compile=compile_)
    compile_if_asked(train, model, "cuda", "replicated")
    engine = make_engine("replicated", accelerator, model, make_optimizer(model, OptimConfig()), 1.0, objective)
    numbers, generator = [], torch.Generator().manual_seed(3)
    with without_looking_at_batches(one_document_a_row=True):
        with same_bits(True):
            told = engine.capture(train, B, T, accumulates=True)
        engine.model.train()
        for step in range(6):
            for micro_step in range(2):
                ids = torch.randint(VOCABULARY, (B, T), generator=generator).cuda()
                scored = None if step % 2 else (torch.rand(B, T - 1, generator=generator) < 0.7).cuda()
                torch.manual_seed(100 * step + micro_step)
                with engine.micro_step(micro_step == 1), same_bits(True):
                    numbers.append(engine.learn({"input_ids": ids}, scored, 1 / (500 + step)).double())
            norm = engine.gradient_norm()
            numbers.append(norm.double())
            engine.step_unless(~torch.isfinite(norm))
    return torch.stack(numbers), [one.detach().clone() for one in model.parameters()], told


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("precision", "compile_"), [("bf16", "auto"), ("bf16", "off"), ("no", "off")])
def test_the_bits_of_a_recording(monkeypatch, kind, precision, compile_):
    monkeypatch.setattr(captured, "BUSY", -1.0)  # recorded, whether it pays or not
    numbers, weights, _ = trained(kind, precision, compile_, "off")
    again, recorded, told = trained(kind, precision, compile_, "auto")
    assert told == "a micro-step is one CUDA graph"
    assert numbers.equal(again) and all(map(torch.equal, weights, recorded))
