"""Torch's memory on a CPU comes in large pages, where the kernel has them, unless the user says otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = """
import contextlib, io, sys
from clm_dist import cli

assert "torch" not in sys.modules
with contextlib.redirect_stdout(io.StringIO()):
    cli.main(["architectures", "gpt2"])
import torch

held = torch.ones(2**26)  # 256 MB
pages = [line.split()[1] for line in open("/proc/self/smaps") if line.startswith("AnonHugePages")]
print(sum(map(int, pages)) / 1024)
"""


@pytest.mark.skipif(not SETTING.is_file() or "[never]" in SETTING.read_text(), reason="no large pages here")
@pytest.mark.parametrize("given", [None, "0"])
def test_torch_has_large_pages_unless_told_otherwise(given):
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"THP_MEM_ALLOC_ENABLE": given} if given is not None else {}
    command = [sys.executable, "-c", HUGE]
    huge = float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    if "[madvise]" in SETTING.read_text():
        assert huge > 200 if given is None else huge < 50  # MB
