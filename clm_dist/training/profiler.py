"""A trace of some steps of the main process: what the CPU launched, and when which kernel ran."""

from pathlib import Path
from typing import Any

import torch

FOLDER = "profile"  # in the run folder


class Profiler:
    """Watches the steps `first` to `last` of a run, if any, and writes a file that https://ui.perfetto.dev and
    chrome://tracing open."""

    def __init__(self, steps: tuple[int, int] | None, run: Path) -> None:
        self._first, self._last = steps or (0, -1)
        self._folder = run / FOLDER
        self._live: Any = None
        self._began = 0

    def look(self, step: int) -> str | None:
        """After each step and before the first one; `step` are done. What to say, where a trace was written."""
        if self._live is not None and step >= self._last:
            return self.end(step)
        if self._live is None and self._first <= step + 1 <= self._last:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._live, self._began = torch.profiler.profile(activities=kinds), step + 1
            self._live.start()
        return None

    def end(self, step: int) -> str | None:
        """The run leaves, or the window is over: writes what there is."""
        if self._live is None:
            return None
        self._live.stop()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"steps-{self._began}-{step}.json.gz"
        self._live.export_chrome_trace(str(path))
        self._live = None
        return f"profile of steps {self._began} to {step}: {path}, which https://ui.perfetto.dev opens"
