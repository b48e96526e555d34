"""`check`: whether a launch learns what one plain process would, shown on the recipe's own first steps.

No run is begun and nothing is written. Every rank computes the reference too, and compares with it what it holds: a model
that does not fit one device is checked with fewer layers (model.config.*), which all promises are blind to.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from clm_dist.checkpoint.saved import SEPARATOR
from clm_dist.config import Config
from clm_dist.engine.engine import Engine
from clm_dist.engine.make import make_engine
from clm_dist.errors import RunError, UserError
from clm_dist.ledger.ledger import DIGEST_MODULUS
from clm_dist.model.build import build_model
from clm_dist.model.checkpointing import checkpoint_activations
from clm_dist.model.configuration import idle_experts
from clm_dist.model.objective import find_objective
from clm_dist.training import train as training
from clm_dist.training.batches import Batches
from clm_dist.training.gate import Opened
from clm_dist.training.job import Job, open_job
from clm_dist.training.reference import Reference, Step
from clm_dist.training.runtime import finish, start
from clm_dist.training.sharding import check_live
from clm_dist.watch.watch import Watch

STEPS = 3  # the second and third show schedules that run at another pace
# Largest relative difference by precision. fp32 differs by the order of sums. The reference is fp32 always; weights differ
# more than what made them, since Adam turns a gradient that is all rounding into a whole step either way.
TOLERANCES = {
    "no": {"loss": 1e-5, "gradient norm": 1e-4, "clipped gradients": 1e-3, "updated weights": 0.02},
    "bf16": {"loss": 2e-3, "gradient norm": 3e-2, "clipped gradients": 0.08, "updated weights": 0.3},
}
# In bf16 the loss follows updates that differ so much: this share of what it has moved by is no error. Under ZeRO, where
# weights are bf16 too, it was 2.1e-3 off after a step from 10.96 to 10.18 (benchmarks/results/2026-11-26-gpu.md).
OF_THE_WAY = 0.05


@dataclass(frozen=True)
class Finding:
    """One promise at one step, on both sides."""

    promise: str
    step: int
    live: float  # an int is a check sum
    reference: float
    difference: float
    tolerance: float
    means: str  # what it is when it is broken

    @property
    def kept(self) -> bool:
        return self.difference <= self.tolerance  # NaN is not

    def __str__(self) -> str:
        verdict = "agrees" if self.kept else "DIFFERS"
        live, reference = (f"{one:x}" if isinstance(one, int) else f"{one:.8g}" for one in (self.live, self.reference))
        numbers = f"{live:<14} {reference:<14} {self.difference:<9.2g} {self.tolerance:<8.2g}"
        return f"{self.step:>4}  {self.promise:<18} {numbers} {verdict}"


def check(config: Config, opened: Opened | None = None) -> list[str]:
    """The lines of a table; a RunError with it where a promise is broken, naming the first. Every rank must call this.

    opened: what `admit` has let in already.
    """
    if config.train.mixed_precision not in TOLERANCES:
        raise UserError(
            f"check compares with a process in fp32, and train.mixed_precision={config.train.mixed_precision} scales its "
            "loss or its numbers, so that the first steps are others; check with train.mixed_precision=bf16 or no"
        )
    job = open_job(config, overwrite=False, run=False, opened=opened)
    plan = job.plan
    accelerator = start(config.train.mixed_precision, job.sharding.settings, idle_experts(job.model_configuration))
    engine = _engine(accelerator, config, job)
    batches = Batches(job.train_blocks, config.train.isolate_documents, accelerator.device)
    live = [_live_step(config, job, engine, batches, number) for number in range(min(STEPS, plan.max_steps))]
    reference = Reference(config, plan, _model(config, job), batches)
    wanted = [reference.step(number) for number in range(len(live))]
    findings = [
        one
        for number in range(len(live))
        for one in _compared(number + 1, live[number], wanted[number], wanted[0].loss, config)
    ]
    findings += _of_what_is_held(accelerator, engine, reference, len(live), config)
    lines = [f"{engine.name}: {plan}", *job.sharding.lines()]
    lines += ["step  promise            live           reference      relative  allowed"]
    lines += [str(one) for one in findings]
    broken = [one for one in findings if not one.kept]
    finish(accelerator)
    if broken:
        raise RunError("\n".join([*lines, f"broken: {broken[0].promise} (step {broken[0].step}): {broken[0].means}"]))
    return [*lines, f"all promises kept over {len(live)} steps, against one plain process in fp32"]


def _engine(accelerator: Accelerator, config: Config, job: Job) -> Engine:
    """As training makes it."""
    model = _model(config, job)
    checkpoint_activations(model, config.train.activation_checkpointing)
    objective = find_objective(model, config.train.chunked_loss)
    optimizer = training.make_optimizer(model, config.optim)
    engine = make_engine(job.sharding.kind, accelerator, model, optimizer, config.optim.max_grad_norm, objective)
    check_live(job.sharding, engine, config)
    engine.settle(job.plan.micro_batch_size, job.plan.block_size)
    return engine


def _model(config: Config, job: Job) -> Any:
    """Without dropout in bf16: kernels of two precisions draw other masks on a GPU."""
    given, configuration = config.model, job.model_configuration
    if config.train.mixed_precision == "bf16":
        configuration = _without_dropout(configuration)
        if given.lora is not None:
            given = given.model_copy(update={"lora": given.lora.model_copy(update={"dropout": 0.0})})
    model = build_model(given, configuration, config.seed, job.manifest.vocab_size)
    model.config.use_cache = False  # type: ignore[union-attr]
    return model


def _without_dropout(configuration: Any) -> Any:
    """A copy whose probabilities of leaving something out (dropout, attn_pdrop, layerdrop, ...) are 0."""
    changed = copy.deepcopy(configuration)
    for part in {id(one): one for one in (changed, changed.get_text_config())}.values():
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return changed


def _live_step(config: Config, job: Job, engine: Engine, batches: Batches, number: int) -> Step:
    """One turn of the loop, without what surrounds it."""
    plan, accelerator = job.plan, engine.accelerator
    engine.model.train()
    engine.set_lr(training.lr_at(number, plan.max_steps, config.optim))
    cursor = number * plan.global_batch_size
    nll, tokens = training.accumulate(config, job, engine, batches, number, cursor, Watch(), leave=lambda: False)
    grad_norm = float(engine.gradient_norm())
    [lr] = {group["lr"] for group in engine.optimizer.param_groups}
    engine.step(update=True)
    mine = torch.tensor([float(nll), float(batches.digest)], dtype=torch.float64, device=accelerator.device)
    total, digest = accelerator.reduce(mine, reduction="sum").tolist()
    return Step(int(digest) % DIGEST_MODULUS, lr, total / tokens, grad_norm)


def _compared(number: int, live: Step, wanted: Step, first_loss: float, config: Config) -> list[Finding]:
    """One step's figures side by side."""
    allowed = TOLERANCES[config.train.mixed_precision]
    of_loss = allowed["loss"]
    if config.train.mixed_precision == "bf16":
        of_loss += OF_THE_WAY * _relative(first_loss, wanted.loss)
    return [
        Finding(
            "blocks", number, live.digest, wanted.digest, float(live.digest != wanted.digest), 0.0,
            "the ranks together read other blocks than the global batch: a rank trains on another's data",
        ),
        Finding(
            "learning rate", number, live.lr, wanted.lr, _relative(live.lr, wanted.lr), 0.0,
            "the schedule runs at another pace, e.g. a scheduler that is stepped by each process",
        ),
        Finding(
            "loss", number, live.loss, wanted.loss, _relative(live.loss, wanted.loss), of_loss,
            "the forward pass or its sum over tokens is another",
        ),
        Finding(
            "gradient norm", number, live.grad_norm, wanted.grad_norm, _relative(live.grad_norm, wanted.grad_norm),
            allowed["gradient norm"], _scale(live.grad_norm / wanted.grad_norm if wanted.grad_norm else math.nan),
        ),
    ]  # fmt: skip


def _of_what_is_held(
    accelerator: Accelerator, engine: Engine, reference: Reference, number: int, config: Config
) -> list[Finding]:
    """Adam's first moments and the updates of weights: of all ranks' shares together. Every rank must call this."""
    allowed = TOLERANCES[config.train.mixed_precision]
    held = engine.held()
    moments = {key.partition(".")[2]: one for key, one in held["optimizer"].items() if key.startswith("exp_avg.")}
    names, start = reference.weights(), reference.start
    weights = {key: one for key, one in held["model"].items() if key.partition(SEPARATOR)[0] in names}
    nothing = {name: torch.zeros_like(one) for name, one in start.items()}
    sums = [*_squares(moments, reference.moments(), nothing), *_squares(weights, names, start)]
    total = accelerator.reduce(torch.tensor(sums, dtype=torch.float64, device=accelerator.device), reduction="sum")
    norms = total.sqrt().tolist()
    found = zip(("clipped gradients", "updated weights"), (norms[:3], norms[3:]), CAUSES, strict=True)
    return [
        Finding(promise, number, live, wanted, off / wanted if wanted else math.nan, allowed[promise], means)
        for promise, (off, live, wanted), means in found
    ]


CAUSES = (
    "what the optimizer was given is another, although norms agree before clipping: clipping does nothing, or clips at "
    "another value than optim.max_grad_norm; or gradients differ that are as long",
    "the update is another: weight decay, betas, eps, or its order",
)


def _squares(
    held: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> list[float]:
    """Sums of squares over this rank's pieces: of the difference, of what is held and of what is wanted, from `start`."""
    sums = torch.zeros(3, dtype=torch.float64)
    for key, piece in held.items():
        name, _, at = key.partition(SEPARATOR)
        first, count = int(at or 0), piece.numel()
        mine, other, origin = (
            one.detach().reshape(-1).double().cpu()
            # what has no gradient has no moments in plain torch, and zeros under ZeRO
            for one in (
                piece,
                *(table.get(name, start[name]).reshape(-1)[first : first + count] for table in (wanted, start)),
            )
        )
        for i, values in enumerate((mine - other, mine - origin, other - origin)):
            sums[i] += values.square().sum()
    return [float(one) for one in sums]


def _relative(one: float, other: float) -> float:
    return abs(one - other) / abs(other) if other else float(one != other)


def _scale(ratio: float) -> str:
    """In words, what a wrong scale of the gradients comes from."""
    return (
        f"gradients are {ratio:.4g} times the reference's: the sum over tokens, accumulation steps and processes is divided "
        "by another number than the tokens of the whole step"
    )
