"""What all ranks know of each other: one sum per step, and whether to stop.

A signal may reach one rank only, and each rank looks at another moment: only what was summed over all may decide.
"""

import time

import torch
from accelerate import Accelerator

from clm_dist.watch.watch import Watch

SECONDS = 1.0  # between agreements in the midst of long work, about


class Agreement:
    """The wish to stop, agreed on, and whatever else is summed with it."""

    def __init__(self, accelerator: Accelerator, watch: Watch) -> None:
        self.accelerator, self.watch = accelerator, watch
        self.stop = False  # all ranks know that all ranks know
        self.interrupted = False  # and it was somebody who is there: Ctrl-C, a stop file
        self._ticks, self._due, self._since = 0, 1, time.monotonic()

    def sum(self, *values: torch.Tensor | float) -> list[float]:
        """Sums over all ranks, in fp64. Every rank must call this; a sync."""
        asked = (float(self.watch.reason is not None), float(self.watch.interrupted))
        device = self.accelerator.device
        mine = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in (*asked, *values)])
        self.watch.at("waiting for the others")
        wishes, interrupts, *sums = self.accelerator.reduce(mine, reduction="sum").tolist()  # sync
        self.stop, self.interrupted = self.stop or wishes > 0, self.interrupted or interrupts > 0
        self.watch.at("update")
        return list(sums)

    def tick(self) -> bool:
        """Whether to leave long work (accumulation, evaluation). Every rank must call this, equally often.

        Agrees about once a second: after how many ticks is reckoned from a time that is agreed on as well.
        """
        self._ticks += 1
        if self._ticks < self._due:
            return self.stop
        [seconds] = self.sum(time.monotonic() - self._since)
        per_tick = seconds / self.accelerator.num_processes / self._ticks
        self._ticks, self._due, self._since = 0, max(1, int(SECONDS / max(per_tick, 1e-6))), time.monotonic()
        return self.stop
