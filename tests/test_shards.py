"""Workers, shards and kills: whatever happens on the way, the same bytes in the end."""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, recipe_values, run_command, write_documents, write_recipe

from clm_dist.errors import UserError
from clm_dist.preparation.work import Shard, WorkFolder

CLM_DIST = [sys.executable, "-m", "clm_dist"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with enough text for a dozen chunks, a tokenizer, and the hash of what one worker prepares."""
    folder = tmp_path_factory.mktemp("shards")
    write_documents(folder / "few.jsonl")
    first = recipe_values(folder, data={"source": str(folder / "few.jsonl"), "prepared_dir": str(folder / "few")})
    assert run_command("prepare", write_recipe(folder / "few.yaml", first)).code == 0
    (folder / "texts").mkdir()
    for number in range(3):
        write_documents(folder / "texts" / f"{number}.jsonl", count=120_000, seed=number)
    data = {
        "source": str(folder / "texts"),
        "tokenizer": str(folder / "few" / "tokenizer"),
        "tokenizer_vocab_size": None,
    }
    write_recipe(folder / "recipe.yaml", recipe_values(folder, data=data))
    done = run_command("prepare", folder / "recipe.yaml", "--workers", "1", f"data.prepared_dir={folder / 'one'}")
    assert done.code == 0, done.err
    return folder


def contents(folder: Path) -> str:
    """Hash of every name and byte in a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def begin(place, target, *options):
    command = [*CLM_DIST, "prepare", str(place / "recipe.yaml"), f"data.prepared_dir={target}", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def children(process) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def gone(pid: int, seconds: float) -> bool:
    """Whether a process ends in time (a zombie has ended)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def until_units(target: Path, number: int, process) -> None:
    units = target.with_name(f".{target.name}.prepare") / "units"
    deadline = time.monotonic() + 300
    while len(list(units.glob("*.npz"))) < number:
        assert process.poll() is None and time.monotonic() < deadline, end(process)
        time.sleep(0.01)


def test_shards_are_parsed():
    assert Shard.parse("2/8") == Shard(2, 8)


@pytest.mark.parametrize("text", ["8/8", "-1/2", "1", "a/b", "1/0", "1/2/3", ""])
def test_what_is_no_shard(text):
    with pytest.raises(Exception, match="names no shard; write INDEX/COUNT"):
        Shard.parse(text)


@pytest.mark.parametrize("parts", [1, 3, 40])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_chunk_is_taken_by_one_shard(parts, count):
    for part in range(parts):
        for chunk in range(7):
            assert sum(Shard(index, count).takes(part, parts, chunk) for index in range(count)) == 1


@pytest.mark.parametrize("workers", ["2", "3"])
def test_any_number_of_workers_gives_the_same_bytes(place, tmp_path, workers):
    code, _, err = end(begin(place, tmp_path / "set", "--workers", workers))
    assert code == 0, err
    assert contents(tmp_path / "set") == contents(place / "one")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]  # no cache left behind


def test_four_shards_at_once_give_the_same_bytes(place, tmp_path):
    shards = [begin(place, tmp_path / "set", "--shard", f"{index}/4", "--workers", "1") for index in range(4)]
    for code, _, err in map(end, shards):
        assert code == 0, err
    assert contents(tmp_path / "set") == contents(place / "one")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.slow
def test_shards_one_after_another_with_status(place, tmp_path):
    def status():
        code, out, err = end(begin(place, tmp_path / "set", "--status"))
        assert code == 0, err
        return out

    assert "nothing is done yet" in status()
    code, out, _ = end(begin(place, tmp_path / "set", "--shard", "1/2"))
    assert code == 0 and re.search(
        r"shard 1 of 2 is done; 6 chunks of 12 are done; 3 of 3 files are not complete", out
    ), out
    assert not (tmp_path / "set").exists()
    found = status()
    assert "is not complete: 6 chunks of 12 are done" in found and "nobody is at work" in found
    assert re.search(r"texts/0.jsonl: 2 of 4 chunks", found), found
    code, out, _ = end(begin(place, tmp_path / "set", "--shard", "0/2"))
    assert code == 0 and "prepared in" in out
    assert "is complete" in status()
    assert contents(tmp_path / "set") == contents(place / "one")
    code, out, _ = end(begin(place, tmp_path / "set", "--shard", "1/2"))
    assert code == 0 and "already prepared" in out


def test_a_killed_shard_is_redone_and_the_others_are_kept(place, tmp_path):
    assert end(begin(place, tmp_path / "set", "--shard", "0/2"))[0] == 0
    units = tmp_path / ".set.prepare" / "units"
    kept = {path: path.stat().st_mtime_ns for path in units.glob("*.npz")}
    other = begin(place, tmp_path / "set", "--shard", "1/2", "--workers", "1")
    until_units(tmp_path / "set", len(kept) + 1, other)
    workers = children(other)
    other.kill()
    assert end(other)[0] == -signal.SIGKILL
    assert workers and all(gone(pid, 10) for pid in workers)  # no orphans
    assert not (tmp_path / "set").exists()
    again = begin(place, tmp_path / "set", "--shard", "1/2", "--workers", "1")
    until_units(tmp_path / "set", len(kept) + 2, again)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert end(again)[0] == 0
    assert contents(tmp_path / "set") == contents(place / "one")


def test_a_killed_worker_is_told_and_the_same_command_goes_on(place, tmp_path):
    process = begin(place, tmp_path / "set", "--workers", "2")
    until_units(tmp_path / "set", 1, process)
    os.kill(children(process)[0], signal.SIGKILL)
    code, _, err = end(process)
    assert code == 1 and "Traceback" not in err
    assert re.search(
        r"failed: worker process \d+ was killed by SIGKILL .*fewer --workers.*finished chunks are kept", err
    )
    assert not (tmp_path / "set").exists()
    assert end(begin(place, tmp_path / "set", "--workers", "2"))[0] == 0
    assert contents(tmp_path / "set") == contents(place / "one")


@pytest.mark.soak
def test_killed_at_random_moments(place, tmp_path):
    """Of a worker, or of the whole command; then the same command again."""
    draw, kills, killed = random.Random(0), 20, 0
    for _ in range(kills):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        process = begin(place, tmp_path / "set", "--workers", "2")
        deadline = time.monotonic() + 300
        while len(children(process)) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 3))
        candidates = children(process) * 3 + [process.pid]
        with suppress(ProcessLookupError):
            os.kill(draw.choice(candidates), signal.SIGKILL)
        code, _, err = end(process)
        killed += code != 0
        assert "Traceback" not in err, err
        code, _, err = end(begin(place, tmp_path / "set", "--workers", "2"))
        assert code == 0, err
        assert contents(tmp_path / "set") == contents(place / "one")
        assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert killed >= kills / 2


@pytest.mark.slow
def test_a_damaged_unit_is_made_again(place, tmp_path):
    assert end(begin(place, tmp_path / "set", "--shard", "0/2"))[0] == 0
    unit = sorted((tmp_path / ".set.prepare" / "units").glob("*.npz"))[0]
    damaged = bytearray(unit.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    unit.write_bytes(damaged)
    code, _, err = end(begin(place, tmp_path / "set"))
    assert code == 1 and "damaged on the disk, and removed; the same command makes it again" in err
    assert not unit.exists()
    assert end(begin(place, tmp_path / "set"))[0] == 0
    assert contents(tmp_path / "set") == contents(place / "one")


def test_two_of_the_same_target_at_once(place, tmp_path):
    """The second one is told who is at it; the first goes on. The same for one shard twice; two shards may."""
    first = begin(place, tmp_path / "set", "--workers", "1")
    until_units(tmp_path / "set", 1, first)
    first.send_signal(signal.SIGSTOP)
    try:
        for options in ([], ["--shard", "0/2"]):
            code, _, err = end(begin(place, tmp_path / "set", *options))
            assert code == 2 and "Traceback" not in err
            assert f"set is being prepared (process {first.pid} on " in err and "wait for it, or share the work" in err
        assert f"at work: process {first.pid} on" in end(begin(place, tmp_path / "set", "--status"))[1]
    finally:
        first.send_signal(signal.SIGCONT)
    assert end(first)[0] == 0
    assert contents(tmp_path / "set") == contents(place / "one")


@pytest.mark.slow
def test_another_recipe_of_the_same_target_at_once(place, tmp_path):
    first = begin(place, tmp_path / "set", "--shard", "0/2", "--workers", "1")
    until_units(tmp_path / "set", 1, first)
    first.send_signal(signal.SIGSTOP)
    try:
        code, _, err = end(begin(place, tmp_path / "set", "--shard", "1/2", "data.append_eos=false"))
        assert code == 2 and "is being prepared with other settings" in err
    finally:
        first.send_signal(signal.SIGCONT)
    assert end(first)[0] == 0


@pytest.mark.slow
def test_work_with_other_settings_is_not_taken_over(place, tmp_path):
    assert end(begin(place, tmp_path / "set", "--shard", "0/2", "data.append_eos=false"))[0] == 0
    assert end(begin(place, tmp_path / "set"))[0] == 0
    assert contents(tmp_path / "set") == contents(place / "one")


def test_shards_that_start_together_take_over_what_others_left(place, tmp_path):
    """As a job array does after a setting was changed: none of them stands in the others' way."""
    left = begin(place, tmp_path / "set", "--shard", "0/2", "data.append_eos=false", "--workers", "1")
    until_units(tmp_path / "set", 1, left)
    left.kill()
    end(left)
    shards = [begin(place, tmp_path / "set", "--shard", f"{index}/3", "--workers", "1") for index in range(3)]
    for code, _, err in map(end, shards):
        assert code == 0, err
    assert contents(tmp_path / "set") == contents(place / "one")


@pytest.mark.slow
def test_units_serve_any_grouping(place, tmp_path):
    """Tokenising is the long part: another block size or held-out share does not do it again."""
    assert end(begin(place, tmp_path / "set", "--shard", "0/2", "data.block_size=32"))[0] == 0
    units = {path: path.stat().st_mtime_ns for path in (tmp_path / ".set.prepare" / "units").glob("*.npz")}
    second = begin(place, tmp_path / "set", "--shard", "1/2", "--workers", "1")
    until_units(tmp_path / "set", len(units) + 1, second)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in units.items())
    assert end(second)[0] == 0
    assert contents(tmp_path / "set") == contents(place / "one")


def test_who_leaves_takes_nothing_away_from_who_assembles(tmp_path):
    """Mutant: a shard that removed `result` when it left took the data set from under another's hands."""
    work = WorkFolder(tmp_path / "set")
    with work.held(Shard(0, 2), "key"):
        (work.units / "some.npz").touch()
        work.result.mkdir()
        with pytest.raises(UserError, match="wrong"), WorkFolder(tmp_path / "set").held(Shard(1, 2), "key"):
            raise UserError("something is wrong")
        assert work.result.exists() and (work.units / "some.npz").exists()
