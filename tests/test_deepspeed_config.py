"""DeepSpeed configurations that are wrong: one message each, with both values and a remedy."""

import pytest
from zero import GATHER, refused, resolved, stage, two

# a configuration, and the one sentence about it; what the recipe says is that of zero.py
BAD = {
    "train batch": (
        two(train_batch_size=16),
        "train_batch_size=16 but train.global_batch_size=12 (2 processes x 3 sequences x 2 accumulation); "
        'write "auto", or change the recipe',
    ),
    "micro-batch": (
        two(train_micro_batch_size_per_gpu=4),
        'train_micro_batch_size_per_gpu=4 but train.micro_batch_size=3; write "auto", or change the recipe',
    ),
    "accumulation": (
        two(gradient_accumulation_steps=4),
        "gradient_accumulation_steps=4 but 2 follows from train.global_batch_size=12 / (2 processes x 3 sequences); "
        'write "auto", or change the recipe',
    ),
    "clipping": (
        two(gradient_clipping=0.5),
        'gradient_clipping=0.5 but optim.max_grad_norm=1.0; write "auto", or change the recipe',
    ),
    "bf16": (
        two(bf16={"enabled": True}),
        'bf16.enabled=true but train.mixed_precision=no; write "auto", or change the recipe',
    ),
    "fp16": (
        two(fp16={"enabled": True}),
        'fp16.enabled=true but train.mixed_precision=no; write "auto", or change the recipe',
    ),
    "optimizer": (
        two(optimizer={"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.95]}}),
        'the optimizer block of type "AdamW" (lr=0.001 there, optim.lr=0.01 here; betas=[0.9, 0.95] there, optim.beta1=0.9 '
        "and optim.beta2=0.999 here): AdamW is set by optim.*; remove the block, and keep the recipe's settings",
    ),
    "muon": (
        two(optimizer={"type": "Muon"}),
        'the optimizer block of type "Muon": AdamW is set by optim.*; remove the block, and keep the recipe\'s settings',
    ),
    "scheduler": (
        two(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}}),
        'the scheduler block of type "WarmupLR" (warmup_num_steps=10 there, optim.warmup_steps=0 here): the learning rate '
        "is optim.schedule's; remove the block, and set optim.schedule=constant for the same course",
    ),
    "the Trainer's blocks": (
        two(optimizer={"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}}),
        'the optimizer block of type "AdamW": AdamW is set by optim.*; remove the block, and keep the recipe\'s settings',
    ),
    "a scheduler of the recipe's course": (
        two(scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}),
        'the scheduler block of type "WarmupDecayLR": the learning rate is optim.schedule\'s; remove the block, and keep '
        "the recipe's settings",
    ),
    "gathering": (
        stage(3, **{GATHER: False}),
        f"zero_optimization.{GATHER}=false, but exports hold whole weights, which are gathered one parameter at a time; "
        'write "auto" or true',
    ),
    "bucket of 0": (
        stage(2, reduce_bucket_size=0),
        "zero_optimization.reduce_bucket_size=0 must be a whole number above 0; correct it, or leave the key out",
    ),
    "negative bucket": (
        stage(2, allgather_bucket_size=-5e8),
        "zero_optimization.allgather_bucket_size=-500000000.0 must be a whole number above 0; correct it, "
        "or leave the key out",
    ),
    "broken bucket": (
        stage(3, stage3_prefetch_bucket_size=1.5),
        "zero_optimization.stage3_prefetch_bucket_size=1.5 must be a whole number of at least 0; correct it, "
        "or leave the key out",
    ),
    "misspelt at the top": (
        two(gradient_cliping=1.0),
        "unknown key gradient_cliping, which DeepSpeed may pass over in silence; did you mean gradient_clipping?",
    ),
    "misspelt below": (
        stage(2, overlap_com=True),
        "unknown key zero_optimization.overlap_com, which DeepSpeed may pass over in silence; did you mean overlap_comm?",
    ),
    "misspelt two below": (
        stage(2, offload_optimizer={"device": "cpu", "pin_memry": True}),
        "unknown key zero_optimization.offload_optimizer.pin_memry, which DeepSpeed may pass over in silence; "
        "did you mean pin_memory?",
    ),
    "misspelt in aio": (
        two(aio={"queue_deph": 8}),
        "unknown key aio.queue_deph, which DeepSpeed may pass over in silence; did you mean queue_depth?",
    ),
    "without stage 3's prefix": (
        stage(3, param_persistence_threshold=10),
        "unknown key zero_optimization.param_persistence_threshold, which DeepSpeed may pass over in silence; "
        "did you mean stage3_param_persistence_threshold?",
    ),
    "misspelt block": (
        two(optimiser={"type": "AdamW"}),
        "unknown key optimiser, which DeepSpeed may pass over in silence; did you mean optimizer?",
    ),
    "stage 0": (
        stage(0),
        "zero_optimization.stage=0 shards nothing; set 1, 2 or 3, or launch with accelerate_configs/ddp.yaml, which needs "
        "no DeepSpeed",
    ),
    "no stage": (
        {"zero_optimization": {}},
        "zero_optimization.stage=null shards nothing; set 1, 2 or 3, or launch with accelerate_configs/ddp.yaml, which "
        "needs no DeepSpeed",
    ),
    "stage in words": (
        {"zero_optimization": {"stage": "two"}},
        'zero_optimization.stage="two" must be 1, 2 or 3; correct it, or leave the key out',
    ),
    "a switch for a section": (
        {"zero_optimization": True},
        "zero_optimization=true must be a section; write {stage, contiguous_gradients, reduce_scatter, ...}",
    ),
    "yes": (
        two(bf16={"enabled": "yes"}),
        'bf16.enabled="yes" must be true or false; correct it, or leave the key out',
    ),
    "auto without a meaning": (
        stage(2, overlap_comm="auto"),
        'zero_optimization.overlap_comm="auto" has no value in a recipe; write true or false, or leave the key out',
    ),
    "parameters at stage 2": (
        stage(2, offload_param={"device": "cpu"}),
        'zero_optimization.offload_param.device="cpu" needs zero_optimization.stage=3, given is 2: only stage 3 shards '
        "parameters; leave offload_param out or set stage 3",
    ),
    "keys of stage 3 at stage 1": (
        stage(1, stage3_max_live_parameters=1e9),
        "zero_optimization.stage3_max_live_parameters=1000000000 is for stage 3, but zero_optimization.stage=1; leave it "
        "out or set stage 3",
    ),
    "nvme at stage 2": (
        stage(2, offload_optimizer={"device": "nvme", "nvme_path": "/nvme"}),
        "zero_optimization.offload_optimizer.device=nvme needs zero_optimization.stage=3, given is 2, which would take it "
        "for cpu; write cpu or set stage 3",
    ),
    "nvme without a path": (
        stage(3, offload_param={"device": "nvme"}),
        "zero_optimization.offload_param.device=nvme without nvme_path; add the path of a folder on a local disk",
    ),
    "nvme": (
        stage(3, offload_optimizer={"device": "nvme", "nvme_path": "/nvme"}),
        "zero_optimization.offload_optimizer.device=nvme: what lies on a disk cannot be put into a checkpoint yet, and "
        "every run saves; write cpu",
    ),
    "round robin": (
        stage(2, round_robin_gradients=True),
        "zero_optimization.round_robin_gradients=true is refused: partitions then lie in another order than DeepSpeed's own "
        "books say, by which checkpoints are written; leave the key out",
    ),
    "buffers in 16 bits": (
        two(data_types={"buffer_dtype": "bf16"}),
        'data_types.buffer_dtype="bf16" is refused: buffers, such as the frequencies of rotary positions, stay as they are '
        "exported; leave the key out",
    ),
    "an odd bucket": (
        stage(2, allgather_bucket_size=200_000_001),
        "zero_optimization.allgather_bucket_size=200000001 must be even for DeepSpeed; write 200000000",
    ),
    "a path without nvme": (
        stage(3, offload_optimizer={"device": "cpu", "nvme_path": "/nvme"}),
        'zero_optimization.offload_optimizer.nvme_path="/nvme" but device="cpu"; write device nvme or leave the path out',
    ),
    "no such device": (
        stage(3, offload_optimizer={"device": "disk"}),
        'zero_optimization.offload_optimizer.device="disk" must be one of none, cpu, nvme; correct it, '
        "or leave the key out",
    ),
    "sequential gathering": (
        stage(3, stage3_allgather_sequential=True, stage3_prefetch_bucket_size=100),
        "zero_optimization.stage3_prefetch_bucket_size=100 but stage3_allgather_sequential=true, with which DeepSpeed "
        "takes 1; leave one of them out",
    ),
    "sums in bf16": (
        two(data_types={"grad_accum_dtype": "bf16"}),
        'data_types.grad_accum_dtype="bf16" would add gradients up in bf16, but sums are fp32 at every '
        'train.mixed_precision (here no); write "fp32" or leave the key out',
    ),
    "weights in bf16": (
        two(data_types={"param_dtype": "bf16"}),
        'data_types.param_dtype="bf16" but train.mixed_precision=no computes in fp32; leave the key out',
    ),
    "sent in fp16": (
        two(communication_data_type="fp16"),
        'communication_data_type="fp16" but train.mixed_precision=no computes in fp32; write fp32, or leave the key out',
    ),
    "untested optimizer": (
        two(zero_allow_untested_optimizer=False),
        "zero_allow_untested_optimizer=false is refused: the optimizer is torch's AdamW, which DeepSpeed takes with true "
        "only; leave the key out",
    ),
    "DeepSpeed's Adam": (
        two(zero_force_ds_cpu_optimizer=True),
        "zero_force_ds_cpu_optimizer=true is refused: the optimizer is torch's AdamW, also where its states are offloaded; "
        "DeepSpeed's own would be compiled at start; leave the key out",
    ),
    "deprecated offload": (
        stage(2, cpu_offload=True),
        "zero_optimization.cpu_offload=true is refused: DeepSpeed has renamed it; "
        'write offload_optimizer: {"device": "cpu"}',
    ),
    "partial offload": (
        stage(3, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        "zero_optimization.offload_optimizer.ratio=0.5 is refused: it needs DeepSpeed's own Adam, and a run takes torch's "
        "AdamW; leave the key out",
    ),
    "no gradient norm": (
        stage(2, compute_grad_norm=False),
        "zero_optimization.compute_grad_norm=false is refused: every log line shows the gradient norm, and clipping needs "
        "it; leave the key out",
    ),
    "accumulation unmanaged": (
        two(managed_gradient_accumulation=False),
        "managed_gradient_accumulation=false is refused: DeepSpeed has to know the last micro-step of a step; "
        "leave the key out",
    ),
    "universal checkpoints": (
        two(checkpoint={"load_universal": True}),
        'checkpoint={"load_universal": true} is refused: checkpoints are the recipe\'s (checkpoint.save_every and beside '
        "it); leave the block out",
    ),
}


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD)
def test_a_bad_configuration_gives_one_message(values, message, tmp_path):
    assert refused(values, tmp_path) == [f"ds.json: {message}"]


def test_messages_are_distinct():
    assert len(BAD) >= 30 and len({message for _, message in BAD.values()}) == len(BAD)


def test_everything_is_said_at_once(tmp_path):
    values = {**stage(2, stag=2, offload_param={"device": "cpu"}), "gradient_clipping": 0.5, "train_batch": 8}
    problems = refused({**values, "scheduler": {"type": "WarmupLR"}}, tmp_path)
    needles = [
        "_optimization.stag,",
        "unknown key train_batch,",
        "offload_param.device",
        "gradient_clipping",
        "scheduler",
    ]
    assert len(problems) == len(needles)
    assert all(needle in problem for needle, problem in zip(needles, problems, strict=True))


def test_no_clipping_is_said_too(tmp_path):
    (message,) = refused(two(gradient_clipping=1.0), tmp_path, norm=None)
    assert "gradient_clipping=1.0 but optim.max_grad_norm=null" in message
    # DeepSpeed would clip at 1.0 where the key is not there
    assert resolved(two(), tmp_path, norm=None).values["gradient_clipping"] == 0.0


def test_the_recipes_precision_may_be_the_one_that_is_not_there(tmp_path):
    (message,) = refused(two(bf16={"enabled": False}), tmp_path, precision="bf16")
    assert "bf16.enabled=false but train.mixed_precision=bf16" in message
    both = refused(two(bf16={"enabled": False}, fp16={"enabled": True}), tmp_path, precision="bf16")
    assert len(both) == 2 and "fp16.enabled=true but train.mixed_precision=bf16" in both[1]
    (message,) = refused(two(communication_data_type="fp16"), tmp_path, precision="bf16")
    assert "write bf16 or fp32" in message
    (message,) = refused(two(), tmp_path, precision="fp16", device="cpu")
    assert "train.mixed_precision=fp16 needs a GPU, and the run is on cpu" in message


def test_a_model_without_a_width(tmp_path):
    (message,) = refused(stage(2, reduce_bucket_size="auto"), tmp_path, hidden_size=None)
    assert message.endswith(
        "goes by the hidden size of the model, which it does not tell; write numbers of elements, e.g. 5e7"
    )
    assert resolved(stage(2, reduce_bucket_size=5e7), tmp_path, hidden_size=None)
