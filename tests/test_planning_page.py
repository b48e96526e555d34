"""The tables of docs/planning.md are what its commands print."""

import re

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"```bash\nclm-dist (.*?)\n```\n\n```text\n(.*?)\n```", PAGE, re.DOTALL)


def test_the_page_shows_both_models():
    assert [re.search(r"model\.type=(\w+)", command).group(1) for command, _ in SHOWN] == ["gpt2", "llama"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shown", "expected"),
    [pytest.param(*SHOWN[0], id="gpt2_xl"), pytest.param(*SHOWN[1], id="llama_7b", marks=pytest.mark.soak)],
)
def test_a_table_is_what_the_command_prints(command, shown, expected):
    done = command(*shown.split())
    assert done.code == 0, done.err
    assert done.out.rstrip() == expected
