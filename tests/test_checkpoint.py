"""A kill or a full disk at every write leaves a checkpoint to go on from; what is damaged is named and passed over."""

import contextlib
import errno
import os
import shutil

import handmade
import pytest
from handmade import newest, save

from clm_dist.checkpoint import disk, folder
from clm_dist.checkpoint.folder import Checkpoint, checkpoints


class Killed(BaseException):
    """Stands for SIGKILL: nothing that this process would do after it happens."""


class FaultyDisk:
    """Lets the k-th moment of all that is done to a disk go wrong: before, in the midst of and after each operation."""

    def __init__(self, monkeypatch, fault: str) -> None:
        self.fault, self.k, self.count, self.hit = fault, 0, 0, False
        self.real = {name: getattr(disk, name) for name in ("write", "rename", "remove", "make_folder", "sync_folder")}
        monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and tells a test nothing
        for name in self.real:
            monkeypatch.setattr(disk, name, getattr(self, f"_{name}", self._around(name)))

    def arm(self, k: int) -> None:
        """0: nothing goes wrong any more."""
        self.k, self.count, self.hit = k, 0, False

    def _moment(self) -> None:
        self.count += 1
        if self.count == self.k or (self.hit and self.fault == "kill"):
            self.hit = True
            raise Killed if self.fault == "kill" else OSError(errno.ENOSPC, "No space left on device")

    def _around(self, name):
        def operation(*arguments):
            self._moment()
            self.real[name](*arguments)
            self._moment()

        return operation

    def _write(self, path, pieces):
        self._moment()
        data = b"".join(bytes(memoryview(piece).cast("B")) for piece in pieces)
        path.write_bytes(data[: len(data) // 2])
        self._moment()
        path.unlink()
        written = self.real["write"](path, [data])
        self._moment()
        return written

    def _remove(self, path):
        self._moment()
        for file in sorted(path.iterdir())[::2]:  # whichever come first
            file.unlink()
        self._moment()
        self.real["remove"](path)
        self._moment()


def save_and_rotate(place):
    save(place, 20)
    folder.rotate(place, keep_last=1, keep_every=None, keep_best=0)


def rotate_and_save(place):
    """The mutant: room is made before the new one is whole."""
    shutil.rmtree(place / "step-00000010", ignore_errors=True)
    save(place, 20)


def survivors(tmp_path, faulty, work, there) -> list[tuple[int, int | None]]:
    """(k, step of the newest whole checkpoint) for every k that work meets; afterwards a new save must succeed."""
    faulty.arm(0)
    save(tmp_path / "before", there)
    found, met = [], True
    while met:
        k = len(found) + 1
        place = tmp_path / f"{work.__name__}-{k}"
        shutil.copytree(tmp_path / "before", place)
        faulty.arm(k)
        with contextlib.suppress(OSError, Killed):
            work(place)
        met = faulty.hit
        faulty.arm(0)
        found.append((k, newest(place)))
        if faulty.fault == "full" or k % 2:  # as the saver does; as the next start does, or not
            folder.clear(place)
            assert newest(place) == found[-1][1], k
        save_and_rotate(place)
        assert newest(place) == 20, k
        assert [one.path.name for one in checkpoints(place)] == ["step-00000020"], k
    return found


@pytest.mark.parametrize("there", [10, 20])
@pytest.mark.parametrize("fault", ["full", "kill"])
def test_a_fault_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, fault, there):
    """there: the one good checkpoint of before; of the same step after a rewind, when it is saved again."""
    found = survivors(tmp_path, FaultyDisk(monkeypatch, fault), save_and_rotate, there)
    assert len(found) > 40  # moments
    assert {step for _, step in found} == {there, 20}
    assert found[-1][1] == 20  # nothing went wrong


@pytest.mark.parametrize("fault", ["full", "kill"])
def test_mutant_making_room_first_leaves_nothing(tmp_path, monkeypatch, fault):
    found = survivors(tmp_path, FaultyDisk(monkeypatch, fault), rotate_and_save, 10)
    assert None in {step for _, step in found}


@pytest.fixture
def two(tmp_path):
    """Steps 10 and 20, both whole."""
    for step in (10, 20):
        save(tmp_path, step)
    assert newest(tmp_path) == 20
    return tmp_path


def flip(path, mask=1):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= mask
    path.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "flipped high": lambda path: flip(path, 0x80),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", handmade.FILES)
def test_damage_is_named_and_the_older_one_taken(two, name, damage):
    one = Checkpoint(two / "step-00000020")
    DAMAGE[damage](one.path / name)
    problem = one.problem()
    if name == folder.MARK and damage in ("missing", "a folder"):
        assert problem == "half-written: it has no commit mark"
    else:
        assert (folder.MANIFEST if name == folder.MARK else name) in problem
    assert newest(two) == 10


@pytest.mark.parametrize("name", handmade.FILES)
def test_without_rereading_only_lengths_are_looked_at(two, name):
    one = Checkpoint(two / "step-00000020")
    flip(one.path / name)
    small = name in (folder.MANIFEST, folder.MARK)  # read anyway
    assert (one.problem(reread=False) is not None) == small


def test_half_renamed_is_half_written(two):
    (two / "step-00000020" / folder.MARK).rename(two / "step-00000020" / f"{folder.MARK}.partial")
    assert [one.problem() for one in checkpoints(two)] == ["half-written: it has no commit mark", None]


def test_staged_ones_are_passed_over_and_cleared(two):
    folder.stage(two, 30)
    assert [(one.step, one.problem()) for one in checkpoints(two)] == [
        (30, "half-written: it has no commit mark"),
        (20, None),
        (10, None),
    ]
    folder.clear(two)
    assert sorted(path.name for path in two.iterdir()) == ["step-00000010", "step-00000020"]


@pytest.mark.parametrize("name", ["../step-00000010/state.json", "/etc/hostname", "..", ".", "a/b", ""])
def test_names_in_a_manifest_stay_in_the_folder(two, name):
    path = two / "step-00000020"
    outside = path / name
    size = outside.stat().st_size if outside.is_file() else 0
    digest = disk.sha256(outside) if outside.is_file() else ""
    manifest = {"format": 1, "files": {name: {"sha256": digest, "bytes": size}}}
    handmade.mark(path, folder.to_json(manifest))
    problem = Checkpoint(path).problem()
    assert problem == f"{name} is no file of a checkpoint" or problem == f"{name} is missing"
    assert newest(two) == 10


MANIFESTS = {
    "no JSON": b"\x80\x04}",
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "no files": b'{"format": 1}',
    "a number for a file": b'{"format": 1, "files": {"state.json": 3}}',
    "of tomorrow": b'{"format": 2, "files": {}}',
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_strange_manifests_are_a_problem_and_no_error(two, kind):
    handmade.mark(two / "step-00000020", MANIFESTS[kind])
    assert Checkpoint(two / "step-00000020").problem()
    assert newest(two) == 10


@pytest.mark.parametrize("state", ["null", "{}", '{"step": 20, "cursor": "x", "world_size": 1}', "{"])
def test_a_state_without_its_numbers_is_a_problem(two, state):
    path = two / "step-00000020"
    (path / folder.STATE).write_text(state)
    handmade.seal(path)
    assert Checkpoint(path).problem()
    assert newest(two) == 10


LOSSES = {10: 3.0, 20: 1.0, 30: float("nan"), 40: None, 50: 2.0}  # of an evaluation at that step
KEPT = [  # keep_last, keep_every, keep_best: what stays
    (1, None, 0, [50]),
    (2, None, 0, [50, 40]),
    (9, None, 0, [50, 40, 30, 20, 10]),
    (1, 20, 0, [50, 40, 20]),
    (1, 7, 0, [50]),
    (1, None, 1, [50, 20]),
    (1, None, 2, [50, 20]),
    (1, None, 3, [50, 20, 10]),
    (2, 30, 1, [50, 40, 30, 20]),
]


@pytest.mark.parametrize(("last", "every", "best", "kept"), KEPT)
def test_rotation(tmp_path, monkeypatch, last, every, best, kept):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for step, loss in LOSSES.items():
        save(tmp_path, step, loss)
    folder.stage(tmp_path, 60)
    (tmp_path / "step-00000045").mkdir()  # half-written: counts for nothing, and is not ours to remove
    folder.rotate(tmp_path, last, every, best)
    assert [one.step for one in checkpoints(tmp_path) if one.problem() is None] == kept
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000045", *(f"step-{step:08d}" for step in kept)}


def test_set_aside_loses_nothing(two):
    targets = []
    for _ in range(2):
        targets.append(folder.set_aside(two, Checkpoint(two / "step-00000020")))
        save(two, 20)
    assert [target.name for target in targets] == ["step-00000020-0", "step-00000020-1"]
    assert all((target / folder.MARK).is_file() for target in targets)
    assert [one.step for one in checkpoints(two)] == [20, 10]


def test_checkpoints_are_sorted_by_number(tmp_path):
    for name in ("step-00000009", "step-100000000", "step-99999999", "step-7", "other", "step-00000001.txt"):
        (tmp_path / name).mkdir()
    assert [one.step for one in checkpoints(tmp_path)] == [100_000_000, 99_999_999, 9]
    assert checkpoints(tmp_path / "nowhere") == []
