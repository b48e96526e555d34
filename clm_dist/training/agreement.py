"""What all ranks know of each other: one sum per step, and whether to stop.

A signal may reach one rank only, and each rank looks at another moment: only what was summed over all may decide.
"""

import time

import torch
from accelerate import Accelerator

from clm_dist.watch.watch import Watch

SECONDS = 1.0  # between agreements in the midst of long work, about


class Sums:
    """Sums on their way from the device: what is launched after them is not waited for."""

    def __init__(self, on_device: torch.Tensor) -> None:
        self.on_device = on_device[2:]  # beside the two wishes to stop
        self._arrived: torch.cuda.Event | None = None
        self._host = on_device
        if on_device.is_cuda:
            self._host = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            self._host.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """The numbers; a sync."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class Agreement:
    """The wish to stop, agreed on, and whatever else is summed with it."""

    def __init__(self, accelerator: Accelerator, watch: Watch) -> None:
        self.accelerator, self.watch = accelerator, watch
        self.stop = False  # all ranks know that all ranks know
        self.interrupted = False  # and it was somebody who is there: Ctrl-C, a stop file
        self._ticks, self._due, self._since = 0, 1, time.monotonic()

    def sum(self, *values: torch.Tensor | float) -> list[float]:
        """Sums over all ranks, in fp64. Every rank must call this; a sync."""
        return self.read(self.start(*values))

    def start(self, *values: torch.Tensor | float) -> "Sums":
        """The same, on the way: a GPU is not waited for. Every rank must call this."""
        numbers = [float(self.watch.reason is not None), float(self.watch.interrupted)]
        numbers += [0.0 if isinstance(value, torch.Tensor) else value for value in values]
        mine = torch.tensor(numbers, dtype=torch.float64).to(self.accelerator.device, non_blocking=True)
        for place, value in enumerate(values, start=2):
            if isinstance(value, torch.Tensor):
                mine[place] = value.detach()
        self.watch.at("waiting for the others")
        return Sums(self.accelerator.reduce(mine, reduction="sum"))

    def read(self, sums: "Sums") -> list[float]:
        """What was started. Every rank must call this."""
        wishes, interrupts, *found = sums.read()
        self.stop, self.interrupted = self.stop or wishes > 0, self.interrupted or interrupts > 0
        self.watch.at("update")
        return found

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
