"""What training shows: loss over the steps since the last line, speed, and the one designed log line."""

import time

import torch
from accelerate import Accelerator

from clm_dist.training.plan import Plan


class Meter:
    """Sums on the device, without a synchronisation, until a log line is due."""

    def __init__(self, accelerator: Accelerator, plan: Plan) -> None:
        self.accelerator = accelerator
        self.plan = plan
        self.nll = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self.tokens = 0  # scored tokens of all ranks since the last line
        self.steps = 0
        self.training_seconds = 0.0  # of the whole run, without evaluation and export
        self.window_seconds = 0.0
        self._since = time.perf_counter()

    def add(self, nll: torch.Tensor) -> None:
        """A micro-batch's summed nats, on this rank."""
        self.nll += nll.detach()

    def end_step(self, scored_tokens: int) -> None:
        """One update is done; `scored_tokens` of all ranks together."""
        self.tokens += scored_tokens
        self.steps += 1

    def pause(self) -> None:
        """Stops the clock: what follows (evaluation, export) is not training."""
        elapsed = time.perf_counter() - self._since
        self.training_seconds += elapsed
        self.window_seconds += elapsed

    def resume(self) -> None:
        """Starts the clock again."""
        self._since = time.perf_counter()

    def read(self, step: int, lr: float, grad_norm: torch.Tensor) -> dict[str, float]:
        """The metrics since the last call, which then start anew. Every rank must call this; the only regular sync."""
        nll = self.accelerator.reduce(self.nll, reduction="sum").item()  # sync
        self.pause()
        self.resume()
        seconds, tokens = self.window_seconds, self.steps * self.plan.tokens_per_step
        metrics = {
            "train/loss": nll / self.tokens,
            "train/lr": lr,
            "train/grad_norm": float(grad_norm),  # sync, already waited for
            "train/epoch": self.plan.epoch(step),
            "train/tokens_seen": step * self.plan.tokens_per_step,
            "perf/tokens_per_second": tokens / seconds,
            "perf/seconds_per_step": seconds / self.steps,
        }
        self.nll.zero_()
        self.tokens, self.steps, self.window_seconds = 0, 0, 0.0
        return metrics


def train_line(step: int, metrics: dict[str, float], plan: Plan) -> str:
    """Always the same fields in the same order and width."""
    left = (plan.max_steps - step) * metrics["perf/seconds_per_step"]
    width = len(f"{plan.max_steps:,}")
    return (
        f"step {step:>{width},}/{plan.max_steps:,} | epoch {metrics['train/epoch']:6.2f} | "
        f"loss {metrics['train/loss']:8.4f} | lr {metrics['train/lr']:.2e} | norm {metrics['train/grad_norm']:7.3f} | "
        f"{metrics['perf/tokens_per_second']:>9,.0f} tokens/s | {duration(left)} left"
    )


def evaluation_line(step: int, metrics: dict[str, float], plan: Plan) -> str:
    """The figures of one evaluation, aligned with the lines of training."""
    width = len(f"{plan.max_steps:,}")
    return f"step {step:>{width},}/{plan.max_steps:,} | " + figures(metrics)


def figures(metrics: dict[str, float]) -> str:
    """An evaluation in words."""
    return (
        f"eval loss {metrics['eval/loss']:.4f} | perplexity {metrics['eval/perplexity']:,.2f} | "
        f"bits per byte {metrics['eval/bits_per_byte']:.4f} | accuracy {metrics['eval/accuracy']:.2%} | "
        f"{metrics['eval/tokens']:,.0f} tokens"
    )


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
