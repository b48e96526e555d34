"""What training shows: loss over the steps since the last line, speed, and the one designed log line."""

import resource
import time
from typing import Any

import torch

from clm_dist.config import ModelConfig
from clm_dist.planning.estimate import flops_per_token
from clm_dist.planning.shapes import shapes
from clm_dist.training.plan import Plan
from clm_dist.training.state import TrainState

# 10^12 operations a second in bf16 without sparsity, by NVIDIA's data sheets; the first name that is part of the device's
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
}


class Meter:
    """The clock of training. The sums it reads are the state's, so that a resumed run shows what any run would."""

    def __init__(self, plan: Plan, recorded: int = 0) -> None:
        self.plan = plan
        self.recorded = recorded  # bytes of the GPU beside those of allocations
        self.flops_per_token = self.peak_flops = 0.0  # 0: not known
        self.steps = 0  # of this process, since the last line
        self.window_seconds = self.data_seconds = 0.0
        self._since = time.perf_counter()

    def know_device(self, config: ModelConfig, built: Any) -> None:
        """Where the data sheet of the GPU is known, the share of it that is used becomes a figure."""
        peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        if peak is not None:
            self.peak_flops = peak
            # by convention what is computed a second time does not count
            self.flops_per_token = flops_per_token(shapes(config, built), self.plan.block_size, checkpointing=False)

    def pause(self) -> None:
        """Stops the clock: what follows (evaluation, export) is not training."""
        self.window_seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        """Starts the clock again."""
        self._since = time.perf_counter()

    def read(self, state: TrainState, lr: float, grad_norm: torch.Tensor) -> dict[str, float]:
        """The metrics since the last call; the state's sums then start anew."""
        self.pause()
        self.resume()
        seconds, steps = self.window_seconds, max(1, self.steps)
        metrics = {
            "train/loss": state.nll / state.tokens if state.tokens else float("nan"),
            "train/lr": lr,
            "train/grad_norm": float(grad_norm),  # sync, already waited for
            "train/epoch": self.plan.epoch(state.step),
            "train/tokens_seen": state.step * self.plan.tokens_per_step,
            "train/steps": state.steps,
            "perf/tokens_per_second": steps * self.plan.tokens_per_step / seconds,
            "perf/seconds_per_step": seconds / steps,
            "perf/data_wait_share": self.data_seconds / seconds,
            "perf/peak_memory_gib": (peak_memory() + self.recorded) / 2**30,
            **self._mfu(steps * self.plan.tokens_per_step / seconds),
        }
        state.nll, state.tokens, state.steps = 0.0, 0, 0
        self.steps, self.window_seconds, self.data_seconds = 0, 0.0, 0.0
        return metrics

    def _mfu(self, tokens_per_second: float) -> dict[str, float]:
        """Share of what the GPUs' data sheet promises, where both it and the model's operations are known."""
        if not self.flops_per_token or not self.peak_flops:
            return {}
        return {"perf/mfu": tokens_per_second * self.flops_per_token / (self.plan.world_size * self.peak_flops)}


def peak_memory() -> int:
    """Bytes that this process has held at most: on its GPU, or, without one, at all."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: str) -> float | None:
    """Operations a second in bf16, dense, by the data sheet; None for what is not in the table."""
    return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if name in device), None)


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
