"""A trace of the steps that were asked for, wherever a start of the run begins or ends."""

import gzip
import json

import pytest
import torch

from clm_dist.training.profiler import Profiler


def run(folder, steps, start, end):
    """Steps start + 1 to end, and what was said after each."""
    profiler, said = Profiler(steps, folder), []
    profiler.look(start)
    for step in range(start + 1, end + 1):
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(3).sum()
        said.append(profiler.look(step))
    return [*said, profiler.end(end)]


def traced(path):
    """The steps in a trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("step ")})


@pytest.mark.parametrize(
    ("start", "end", "name", "steps"),
    [
        (0, 6, "steps-2-3", ["step 2", "step 3"]),
        (2, 6, "steps-3-3", ["step 3"]),  # resumed within the window
        (0, 2, "steps-2-2", ["step 2"]),  # stopped within it
    ],
)
def test_the_window(tmp_path, start, end, name, steps):
    [told] = [one for one in run(tmp_path, (2, 3), start, end) if one]
    [path] = (tmp_path / "profile").iterdir()
    assert path.name == f"{name}.json.gz" and str(path) in told
    assert traced(path) == steps


@pytest.mark.parametrize(("steps", "start"), [(None, 0), ((2, 3), 3), ((9, 9), 0)])
def test_no_window_no_file(tmp_path, steps, start):
    assert not any(run(tmp_path, steps, start, 5))
    assert not (tmp_path / "profile").exists()
