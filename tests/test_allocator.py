"""What a step frees stays with the process on a CPU; what is large goes back, and so does all where the user says so."""

import os
import platform
import subprocess
import sys

import pytest

from clm_dist.training.allocator import OWN_CHOICE

HELD = """
import os, torch
from clm_dist.training.allocator import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

keep_freed_memory()
before = resident()
tensors = [torch.ones(2**20) for _ in range(100)]  # 4 MB each
del tensors
small = resident() - before
large = torch.ones(2**26)  # 256 MB
del large
print(small, resident() - before - small)
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")


def held(**given):
    """MB that are still there of 400 in small tensors, and of 256 in a large one."""
    environment = {key: value for key, value in os.environ.items() if key not in OWN_CHOICE} | given
    done = subprocess.run([sys.executable, "-c", HELD], env=environment, capture_output=True, text=True, check=True)
    return [float(one) for one in done.stdout.split()]


def test_what_is_freed_is_kept_but_for_large_tensors():
    small, large = held()
    assert small > 350 and large < 50


def test_the_user_has_the_last_word():
    small, large = held(MALLOC_TRIM_THRESHOLD_="131072")
    assert small < 50 and large < 50
