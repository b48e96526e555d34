"""The README's picture of speed shows what the results file says."""

import re
import sys
from collections import Counter

from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from picture import PANELS, SIDES, draw, read

RESULTS = """# Speed and memory beside peers, CPU

## small

|  | tokens/s | of ours | peak memory, GiB | of ours | MFU | loss at the end |
|---|---|---|---|---|---|---|
| clm-dist | 1,453 (1,365 to 1,475) | 1.00 | 0.79 (0.79 to 0.80) | 1.00 |  | 10.1300 |
| Trainer | 1,044 (1,039 to 1,118) | 0.72 | 2.00 (1.98 to 2.00) | 2.53 |  | 10.0508 |
| no-trainer | FAILED: out of memory | | | | | |
| minimal (compiled) | 854 (839 to 860) | 0.59 | 2.31 (2.29 to 2.32) | 2.93 |  | 10.1108 |
| clm-dist train.chunked_loss=false | 1,000 | 0.69 | 2.00 | 2.53 |  | 10.1300 |

## ours failed

| clm-dist | FAILED: why | | | | | |
"""


def test_medians_beside_ours_are_read():
    assert read(RESULTS) == {
        "small\n(CPU)": {
            "clm-dist": {"tokens/s": 1.0, "memory": 1.0},
            "Trainer": {"tokens/s": 0.72, "memory": 2.53},
            "minimal": {"tokens/s": 0.59, "memory": 2.93},
        }
    }


OLD = "GPT-2, 8 x 1,024, bf16"  # before micro-steps were recorded


def test_a_bar_for_each_that_was_measured():
    speed, memory = draw(read(RESULTS)).axes
    for axes, expected in ((speed, ["1.00", "0.72", "", "0.59"]), (memory, ["1.00", "2.53", "", "2.93"])):
        assert [text.get_text() for text in axes.texts] == expected
        assert [bars.get_label() for bars in axes.containers] == [*list(SIDES)[:3], "loop by hand"]


def test_the_readme_shows_what_the_results_say():
    assert "docs/images/speed.svg" in (ROOT / "README.md").read_text(encoding="utf-8")
    picture = (ROOT / "docs" / "images" / "speed.svg").read_text(encoding="utf-8")
    shown = re.findall(r">(\d\.\d\d)</text>", picture)
    cases = {}
    for name in ("2026-11-27-speed-fused-gelu.md", "2026-11-27-speed-gpu.md", "2026-11-26-speed-gpu.md"):
        cases |= read((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
    cases = {title: case for title, case in cases.items() if not title.startswith(OLD)}
    bars = [f"{case[side][key]:.2f}" for key in PANELS for side in SIDES for case in cases.values() if side in case]
    assert not Counter(bars) - Counter(shown)
    assert all(title.split("\n")[0] in picture for title in cases)
