"""Bytes of a model's state, by hand. That the live tensors have them is in tests/distributed/test_plan_live.py."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY, tiny_configuration

from clm_dist.config import ModelConfig
from clm_dist.planning.memory import (
    STRATEGIES,
    Envelope,
    Line,
    ModelState,
    Strategy,
    ZeroSettings,
    buffers,
    by_paper,
    model_state,
)
from clm_dist.planning.shapes import Shapes, shapes

DDP, ZERO1, ZERO2, ZERO3, FSDP2, ZERO2_OFFLOAD, ZERO3_OFFLOAD = STRATEGIES
# a model of 12 parameters: matrices of 5 and 4 elements, a bias of 3
SMALL = Shapes(matrices=(5, 4), vectors=(3,), frozen=(), buffer_bytes=0, lookup=0, layers=1, width=2)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_table_of_the_zero_paper(stage, gigabytes):
    """Figure 1 of arXiv:1910.02054: 7.5 billion parameters on 64 GPUs."""
    assert round(by_paper(7_500_000_000, stage, 64) / 1e9, 1) == gigabytes


@pytest.mark.parametrize("mixed", [False, True])
def test_ddp_holds_everything_in_fp32(mixed):
    # 4 + 4 + 8 bytes each, and a step count of 4 for each of 3 tensors
    assert model_state(SMALL, DDP, 2, mixed) == ModelState(48, 48, 96 + 12)


def test_stages_1_and_2_pad_each_group_and_keep_whole_tensors_in_fp32():
    # 9 -> 12 elements in parts of 6, 3 -> 4 in parts of 2: multiples of twice two ranks
    parameters, states = 4 * (12 + 4), 12 * (6 + 2) + 2 * 4
    for stage in (ZERO1, ZERO2):
        # rank 0 has elements 0 to 5 of the matrices, which touch both, and 0 and 1 of the bias
        assert model_state(SMALL, stage, 2, False, rank=0) == ModelState(parameters, 4 * (5 + 4 + 3), states)
        # rank 1 has 6 to 11: of the second matrix, and 3 of padding; of the bias one element, and one of padding
        assert model_state(SMALL, stage, 2, False, rank=1) == ModelState(parameters, 4 * (4 + 3 + 3 + 1), states)


def test_while_accumulating_stage_1_keeps_all_gradients_and_stage_2_its_own():
    assert model_state(SMALL, ZERO1, 2, False, rank=1, accumulating=True).gradients == 4 * 12
    assert model_state(SMALL, ZERO2, 2, False, rank=1, accumulating=True).gradients == 4 * (4 + 3)


def test_bf16_halves_parameters_and_of_stage_1_gradients_too():
    states = 12 * 8 + 2 * 4
    assert model_state(SMALL, ZERO1, 2, True) == ModelState(2 * 16, 2 * 12, states)
    assert model_state(SMALL, ZERO1, 2, True, rank=1) == ModelState(2 * 16, 2 * (4 + 3 + 3 + 1), states)
    assert model_state(SMALL, ZERO1, 2, True, rank=1, accumulating=True).gradients == 2 * 12
    assert model_state(SMALL, ZERO2, 2, True) == ModelState(2 * 16, 4 * 8, states)


def test_stage_3_cuts_each_tensor_and_keeps_small_ones_whole_beside():
    settings = ZeroSettings(stage3_param_persistence_threshold=3)
    # parts of 3, 2 and 2 elements; the bias besides, gathered from two parts of 2
    assert model_state(SMALL, ZERO3, 2, True, zero=settings) == ModelState(2 * 7 + 2 * 4, 4 * 7, 12 * 7 + 2 * 4)
    all_cut = ZeroSettings(stage3_param_persistence_threshold=0)
    assert model_state(SMALL, ZERO3, 3, False, zero=all_cut) == ModelState(4 * (2 + 2 + 1), 4 * 5, 12 * 5 + 2 * 4)


def test_stage_3_updates_large_groups_in_pieces():
    settings = ZeroSettings(stage3_param_persistence_threshold=0, sub_group_size=3)
    # the matrices' parts are 3 and 2: a piece each; the bias's 2: one
    assert model_state(SMALL, ZERO3, 2, True, zero=settings).optimizer_states == 12 * 7 + 3 * 4


def test_fsdp2_cuts_rows_and_keeps_everything_in_fp32():
    # 5 x 1, 2 x 2 and 3: of two ranks the first has 3, 1 and 2 rows, the second 2, 1 and 1, with room for as many
    small = replace(SMALL, rows=(5, 2, 3))
    assert model_state(small, FSDP2, 2, True) == ModelState(4 * 7, 4 * 7, 8 * 7 + 3 * 4)
    assert model_state(small, FSDP2, 2, True, rank=1) == ModelState(4 * 7, 4 * 7, 8 * 5 + 3 * 4)
    assert model_state(small, FSDP2, 2, True, accumulating=True).gradients == 4 * 12  # whole until they are exchanged
    # of three ranks the last has 1, 0 and 1
    assert model_state(small, FSDP2, 3, True, rank=2) == ModelState(4 * (2 + 2 + 1), 4 * 5, 8 * 2 + 3 * 4)


def test_frozen_parameters_have_no_gradient_and_no_state():
    frozen = Shapes(matrices=(5, 4), vectors=(3,), frozen=(10,), buffer_bytes=0, lookup=0, layers=1, width=2)
    assert model_state(frozen, DDP, 2, False) == ModelState(48 + 40, 48, 108)
    assert model_state(frozen, ZERO2, 2, True).parameters == 2 * 16 + 20


def test_offload_moves_states_and_gradients_to_the_cpu():
    state = model_state(SMALL, ZERO2_OFFLOAD, 2, True)
    assert state == ModelState(2 * 16, 0, 0, host=12 * 8 + 8 + (4 + 2) * 8)
    state = model_state(SMALL, ZERO3_OFFLOAD, 2, True, zero=ZeroSettings(stage3_param_persistence_threshold=3))
    assert state == ModelState(2 * 4, 0, 0, host=12 * 7 + 8 + 4 * 7 + 2 * 7)
    only_states = Strategy("zero3", 3, offload_optimizer=True)
    state = model_state(SMALL, only_states, 2, True, zero=ZeroSettings(stage3_param_persistence_threshold=3))
    assert state == ModelState(2 * 7 + 2 * 4, 0, 0, host=12 * 7 + 8 + 4 * 7)


def test_buffers():
    settings = ZeroSettings(reduce_bucket_size=100, stage3_prefetch_bucket_size=1, stage3_max_live_parameters=7)
    assert buffers(SMALL, DDP, True, settings) == 0
    assert buffers(SMALL, ZERO1, False, settings) == (4 + 4) * 100  # a bucket and its copy
    assert buffers(SMALL, ZERO1, True, settings) == (2 + 2 + 4) * 100  # and that in fp32
    assert buffers(SMALL, ZERO2, True, settings) == (2 + 2 + 4) * 100
    assert buffers(SMALL, ZERO2, True, replace(settings, overlap_comm=True)) == (2 * 2 + 2 + 4) * 100
    assert buffers(SMALL, ZERO2, True, replace(settings, reduce_bucket_size=3)) == 2 * 3 + (2 + 4) * 5
    assert buffers(SMALL, ZERO3, True, settings) == 3 * 4 * 100 + 2 * (7 + 1)
    assert buffers(SMALL, ZERO2_OFFLOAD, True, settings) == (2 + 2 + 4) * 100 + 2 * 5
    # FSDP2: what is in no layer, three layers; whole gradients of one, in fp32 too
    assert buffers(replace(SMALL, largest_block=6, outside=3), FSDP2, True) == 2 * (3 + 3 * 6) + (2 + 4) * 6


def test_a_line():
    assert [Line(10, 3).at(b) for b in (1, 2, 10)] == [13, 16, 40]


def test_an_envelope_is_the_largest_of_its_lines():
    lines = [Line(10, 0), Line(4, 2), Line(0, 3), Line(-7, 5), Line(9, 0), Line(4, 1), Line(-9, 5)]
    envelope = Envelope.over(lines)
    # 10, 10, 10, 13, 18 by hand: 5 B - 7 overtakes 10 between 3 and 4, and what lies below both goes
    assert [envelope.at(b) for b in (1, 2, 3, 4, 5)] == [10, 10, 10, 13, 18]
    assert Line(9, 0) not in envelope.lines and Line(-9, 5) not in envelope.lines and Line(0, 3) not in envelope.lines


@given(st.lists(st.builds(Line, st.integers(0, 50), st.integers(0, 9)), min_size=1, max_size=12), st.integers(0, 99))
def test_an_envelope_loses_nothing(lines, b):
    assert Envelope.over(lines).at(b) == max(line.at(b) for line in lines)


def test_shapes_of_gpt2():
    """Hand count of GPT-2's smallest: the head is the embedding, counted once."""
    config = ModelConfig(type="gpt2")
    from clm_dist.model.configuration import model_configuration

    found = shapes(config, model_configuration(config, {"vocab_size": 50257}))
    assert found.parameters == found.trained == 124_439_808
    # 12 layers of 4 matrices and two embeddings; 8 biases and norms a layer and the last norm's 2
    assert (len(found.matrices), len(found.vectors)) == (12 * 4 + 2, 12 * 8 + 2)
    assert (found.lookup, found.layers, found.width) == (0, 12, 768)
    # a layer of 12 h^2 + 13 h; besides two embeddings and the last norm
    assert found.largest_block == 12 * 768**2 + 13 * 768
    assert found.outside == (50257 + 1024 + 2) * 768
    assert found.rows[:3] == (50257, 1024, 768) and len(found.rows) == 12 * 12 + 4


@pytest.mark.parametrize("name", TINY)
def test_shapes_are_those_of_the_model(name):
    import torch
    from transformers import AutoModelForCausalLM

    built = tiny_configuration(name)
    found = shapes(ModelConfig(type=name), built)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(built)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (found.lookup == 0) == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("name", TINY)
def test_the_tiny_models_need_padding(name):
    """Else the launched tests would not see a wrong one."""
    found = shapes(ModelConfig(type=name), tiny_configuration(name))
    assert all(any(sum(group) % (2 * world_size) for group in found.groups) for world_size in (2, 3))
    assert any(size % world_size for world_size in (2, 3) for group in found.groups for size in group)
