"""The arithmetic of a run: what a step is made of, and how many there are. Pure."""

from dataclasses import dataclass

from clm_dist.config import Config
from clm_dist.data.order import ends_epoch, steps_of_epochs
from clm_dist.disagreements import divisors, lengths
from clm_dist.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """global_batch_size == world_size * micro_batch_size * gradient_accumulation_steps, always."""

    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    block_size: int
    num_blocks: int
    max_steps: int
    evaluate_every: int | None  # None: when an epoch is complete

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.block_size

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step * self.global_batch_size / self.num_blocks

    def evaluation_due(self, step: int) -> bool:
        """Whether to evaluate after `step` steps; the last step always is."""
        if step == self.max_steps:
            return True
        if self.evaluate_every is not None:
            return step % self.evaluate_every == 0
        return ends_epoch(step, self.num_blocks, self.global_batch_size)

    def __str__(self) -> str:
        return (
            f"{self.world_size} processes x {self.micro_batch_size} sequences x {self.gradient_accumulation_steps} "
            f"accumulation x {self.block_size} tokens = {self.tokens_per_step:,} tokens per step; "
            f"{self.max_steps:,} steps = {self.epoch(self.max_steps):.3g} epochs of {self.num_blocks:,} blocks"
        )


def make_plan(config: Config, num_blocks: int, world_size: int) -> Plan:
    """The plan of a run, or a ConfigError with every reason why there is none."""
    train = config.train
    problems = []
    if train.global_batch_size % world_size:
        problems.append(
            f"train.global_batch_size={train.global_batch_size} is not divisible by {world_size} processes; set a multiple "
            f"of {world_size}, or launch one of {divisors(train.global_batch_size)} processes"
        )
    elif train.micro_batch_size is not None and train.global_batch_size % (world_size * train.micro_batch_size):
        per_process = train.global_batch_size // world_size
        problems.append(
            f"train.global_batch_size={train.global_batch_size} is not divisible by {world_size} processes x "
            f"train.micro_batch_size={train.micro_batch_size}; set a micro_batch_size among {divisors(per_process)}"
        )
    if num_blocks < train.global_batch_size:
        problems.append(
            f"{num_blocks} training blocks are fewer than one step's train.global_batch_size={train.global_batch_size}; "
            "lower it, or prepare with a smaller data.block_size or more text"
        )
    if problems:
        raise ConfigError(problems)
    micro_batch_size = train.micro_batch_size or train.global_batch_size // world_size
    max_steps = train.max_steps or steps_of_epochs(train.epochs or 0, num_blocks, train.global_batch_size)
    if config.optim.warmup_steps + (config.optim.decay_steps or 0) > max_steps:
        raise ConfigError(
            [
                f"{lengths(config.optim)} into the {max_steps} steps of train.epochs={train.epochs}; shorten that, or "
                "train longer"
            ]
        )
    return Plan(
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=train.global_batch_size // (world_size * micro_batch_size),
        global_batch_size=train.global_batch_size,
        block_size=config.data.block_size,
        num_blocks=num_blocks,
        max_steps=max_steps,
        evaluate_every=config.evaluate.every_steps,
    )
