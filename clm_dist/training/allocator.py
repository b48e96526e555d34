"""What glibc does with memory that is freed, on a CPU: torch asks it for every tensor there."""

import ctypes
import os
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE = 2**25  # bytes, the most that glibc takes for M_MMAP_THRESHOLD
# of the environment, by which the user may have chosen
OWN_CHOICE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """What a step frees stays with the process for the next one, but for tensors of 32 MB and more.

    Given back and gotten again it is filled with zeros by the kernel, a step's activations in every step, and two processes
    wait for each other there (docs/performance.md). Large tensors go back, since what is kept of them fits no other size.
    Does nothing where there is no glibc, or the user has chosen.
    """
    if not any(os.environ.get(name) for name in OWN_CHOICE):
        with suppress(AttributeError, OSError):  # mallopt(3) is glibc's
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_THRESHOLD, LARGE)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
