"""Prepared data copied to the local disk of a node, once, and compared with its manifest."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from clm_dist.data.manifest import MANIFEST, Manifest, read_manifest
from clm_dist.data.prepared import STAGED
from clm_dist.errors import RunError


@contextmanager
def staged(prepared: str | None, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The environment of a launcher whose ranks read the copy; that of now where there is nothing to copy."""
    if prepared is None:
        yield dict(environment)
        return
    folder = scratch(environment) / f"clm-dist-{environment['SLURM_JOB_ID']}-{environment['SLURM_NODEID']}"
    shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed
    try:
        began = time.monotonic()
        copy(Path(prepared), folder)
        print(
            f"{os.uname().nodename}: {prepared} is in {folder} ({time.monotonic() - began:.0f} s), verified", flush=True
        )
        yield {**environment, STAGED: str(folder)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch(environment: Mapping[str, str]) -> Path:
    """The local disk of a node."""
    return Path(environment.get("SLURM_TMPDIR") or environment.get("TMPDIR") or "/tmp")


def copy(prepared: Path, folder: Path) -> None:
    """A copy of which every file is what its manifest says; RunError that names the first which is not."""
    manifest: Manifest = read_manifest(str(prepared))
    for name, written in manifest.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(prepared / name, target)
        except OSError as error:
            raise RunError(
                f"staging {prepared / name} to {target}: {error.strerror}; free space there, or do not stage"
            ) from None
        with target.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != written["sha256"]:
            raise RunError(f"{prepared / name} is not what was written (SHA-256); `clm-dist data verify {prepared}`")
    shutil.copyfile(prepared / MANIFEST, folder / MANIFEST)
