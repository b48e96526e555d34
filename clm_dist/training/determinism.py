"""The same bits every time. On a GPU, attention and others add in any order unless told not to, and then no two runs of one
recipe agree, nor does a resumed run with one that was never stopped (torch.use_deterministic_algorithms)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clm_dist.errors import UserError

REFUSED = "does not have a deterministic implementation"  # so torch says


def reserve_workspace() -> None:
    """cuBLAS must know before its first product; of its two settings that are deterministic this is the faster one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def same_bits(wanted: bool) -> Iterator[None]:
    """Within, only kernels that give the same bits every time, if `wanted`. On a CPU they are that already."""
    if not (wanted and torch.cuda.is_available()):
        yield
        return
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads it
    try:
        yield
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        raise UserError(
            f"the model uses {str(error).split(REFUSED)[0].strip()}, of which there is no kernel that gives the same bits "
            "every time; set train.deterministic=false: a resumed run is then as near to one never stopped as any two runs"
        ) from error
    finally:
        torch.use_deterministic_algorithms(False)
