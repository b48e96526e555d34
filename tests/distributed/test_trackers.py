"""W&B by courier, with the real client and a local endpoint: one run over restarts, every row once, nobody waits.

Not covered: what W&B's servers do beside the operations in `local_wandb.py` (limits of rates, charts, reports).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import BIN, launch, prepare_recipe, run_command
from crash import Start, wait_for
from local_wandb import KEY, LocalWandb, check_arrived, only, wanted

from clm_dist.publish import outbox

pytest.importorskip("wandb")
pytestmark = [pytest.mark.distributed, pytest.mark.outside]
WANDB = {"trackers": ["wandb"], "project": "a-test", "tags": ["tiny"], "group": "sweep"}


@pytest.fixture
def server():
    with LocalWandb() as server:
        yield server
        assert not server.unknown


def recipe_in(folder: Path, steps: int, **track) -> Path:
    return prepare_recipe(
        folder,
        120,
        generate={"prompts": ["the cat"], "max_new_tokens": 4},
        train={"max_steps": steps, "log_every": 2},
        checkpoint={"save_every": 10},
        evaluate={"every_steps": 20},
        track={**WANDB, **track},
    )


def check_no_key(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def reached(run: Path) -> int:
    """The newest step in a ledger that may be in the midst of a row."""
    try:
        return json.loads((run / "ledger.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return -1


def kill_courier(run: Path) -> None:
    pid = int((run / "outbox" / ".wandb.lock").read_text().split()[1])
    os.kill(pid, signal.SIGKILL)


def test_one_run_over_three_restarts_of_two_processes(tmp_path, server):
    recipe, run = recipe_in(tmp_path, 150), tmp_path / "run"

    def begin(until: int) -> Start:
        start = Start(recipe, run, 2, env=server.environment)
        assert wait_for(lambda: reached(run) >= until), start.log.read_text()
        return start

    first = begin(until=25)
    first.send(signal.SIGKILL, "tree")  # training only: its courier finds out, delivers what there is, and leaves
    first.process.wait(60)
    assert wait_for(lambda: server.runs and len(only(server).history) >= 10)
    second = begin(until=65)
    second.send(signal.SIGTERM, "all")
    assert second.wait() == 75, second.log.read_text()
    third = begin(until=105)
    assert wait_for(lambda: (run / "outbox" / "wandb.rows").read_text().count("\n") > 40)
    kill_courier(run)  # with what it had not sent yet
    third.send(signal.SIGKILL, "tree")
    third.process.wait(60)
    fourth = begin(until=150)
    assert fourth.wait(300) == 0, fourth.log.read_text()

    check_arrived(server, run, computed_again=True)
    there = only(server)
    assert there.state == "finished" and there.settings["groupName"] == "sweep" and there.settings["tags"] == ["tiny"]
    assert there.config["data.block_size"] == 16 and there.config["environment"]["processes"] == 2
    assert sum("samples" in row for row in there.rows()) == 9  # of steps 0, 20, ..., 140, 150
    assert sum(name.startswith("media/table/samples") for name in there.files) == 9
    log = (run / "outbox" / "wandb.log").read_text()
    assert log.count(" delivers\n") == 4  # a courier a start, of the main process
    check_no_key(tmp_path)


def test_an_endpoint_that_is_not_there_costs_nothing_and_all_is_delivered_later(tmp_path, server):
    recipe, run = recipe_in(tmp_path, 40, wandb_mode="online"), tmp_path / "run"
    nowhere = {**server.environment, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = launch(2, "train", recipe, env=nowhere)
    assert done.code == 0, done.err
    assert done.out.count("wandb: no answer from http://127.0.0.1:9 (ConnectionError); training goes on") == 1
    assert f"`clm-dist sync {run}` delivers the rest" in done.out
    failed = run_command("sync", run, env=nowhere)
    assert failed.code == 1 and "wandb: 21 rows have not arrived (steps 0 to 40); no answer from" in failed.out
    refused = sync_with(server, run, "unauthorized")
    assert refused.code == 1 and "refuses the key (status 401); check WANDB_API_KEY" in refused.out
    journal = run / "outbox" / "wandb.rows"
    for moment in (
        lambda: journal.exists() and journal.stat().st_size,  # the client has rows
        lambda: any(one.history for one in server.runs.values()),  # the server has some
    ):
        killed = start_sync(server, run)
        assert wait_for(moment)
        killed.kill()
        killed.wait()
    assert run_command("sync", run, "--status", env=server.environment).code == 1
    done = run_command("sync", run, env=server.environment)
    assert done.code == 0 and "wandb: all has arrived" in done.out, done.out + done.err
    check_arrived(server, run)
    (run / "outbox" / "wandb.json").unlink()  # the notes were lost, and then the journal too
    assert run_command("sync", run, env=server.environment).code == 0
    (run / "outbox" / "wandb.rows").unlink()
    assert run_command("sync", run, env=server.environment).code == 0
    check_arrived(server, run)
    asked = len(server.log)
    again = run_command("sync", run, env=server.environment)
    assert again.code == 0 and len(server.log) == asked  # nothing was asked, let alone sent
    assert run_command("sync", run, "--status").out == "wandb: all has arrived\n"
    check_no_key(tmp_path)


def test_an_endpoint_that_hangs_is_left_alone(tmp_path, server):
    recipe, run = recipe_in(tmp_path, 20, wandb_mode="online", wait_seconds=2), tmp_path / "run"
    server.behave("hang")
    done = run_command("train", recipe, env=server.environment)
    assert done.code == 0 and f"`clm-dist sync {run}` delivers the rest" in done.out, done.out + done.err
    assert wait_for(lambda: not couriers_of(run), 60), "a courier outlived its patience"
    server.behave("well")
    done = run_command("sync", run, env=server.environment)
    assert done.code == 0, done.out + done.err
    check_arrived(server, run)
    [log] = run.glob("wandb/run-*/*.wandb")  # what W&B's client wrote, read back by its own reader
    inspect = [BIN / "wandb", "leet", "inspect", "--json", str(log)]
    records = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sum('"history"' in record and "trainer/step" in record for record in records) >= len(wanted(run))


def test_without_a_key_or_a_route_auto_stays_offline(tmp_path, server):
    recipe, run = recipe_in(tmp_path, 4), tmp_path / "run"
    done = run_command("train", recipe, env={**server.environment, "WANDB_API_KEY": ""})
    assert done.code == 0 and "wandb: offline (no key: set WANDB_API_KEY, or run `wandb login` once)" in done.out
    done = run_command("sync", run, env={**server.environment, "WANDB_MODE": "offline"})
    assert done.code == 1 and "offline (WANDB_MODE=offline)" in done.out
    assert not server.log and not (run / "wandb").exists()


def test_a_client_that_dies_and_a_server_that_is_away_for_a_while(trained, tmp_path, server):
    run = blank_run(trained, tmp_path)
    write_rows(run, range(1, 11))
    courier = follow(run, server)
    assert wait_for(lambda: server.runs and len(only(server).history) == 9)
    [client] = Path(f"/proc/{courier.pid}/task/{courier.pid}/children").read_text().split()
    os.kill(int(client), signal.SIGKILL)
    write_rows(run, range(11, 21))
    assert wait_for(lambda: len(only(server).history) == 19)
    server.behave("refuse")
    write_rows(run, range(21, 31))
    assert wait_for(lambda: (run / "outbox" / "wandb.rows").read_text().count("\n") == 29)
    server.behave("well")
    courier.stdin.write(b"finished 60\n")
    courier.stdin.close()
    assert courier.wait(70) == 0
    assert [row["trainer/step"] for row in only(server).rows()] == list(range(1, 31))


def test_a_courier_that_is_told_to_go_goes_whatever_hangs(trained, tmp_path, server):
    run = blank_run(trained, tmp_path)
    write_rows(run, range(1, 11))
    courier = follow(run, server)
    assert wait_for(lambda: server.runs and only(server).history)
    server.behave("hang")  # inside W&B's client, which waits for as long as it takes
    write_rows(run, range(11, 21))
    courier.send_signal(signal.SIGTERM)
    assert courier.wait(60) == 1
    server.behave("well")
    following, former = follow(run, server), follow(run, server)
    assert {one.wait(90) for one in (following, former) if one.stdin.close() is None} <= {0, 1}
    assert run_command("sync", run, env=server.environment).code == 0
    assert [row["trainer/step"] for row in only(server).rows()] == list(range(1, 21))


def blank_run(trained, tmp_path) -> Path:
    """A run folder that nobody trains in."""
    run = tmp_path / "run"
    run.mkdir()
    text = (trained / "run" / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("trackers: []", "trackers: [wandb]"))
    outbox.identify(run, {})
    return run


def write_rows(run: Path, steps) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "time": time.time(), "train/loss": step / 2}) + "\n")


def follow(run: Path, server) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "clm_dist", "sync", str(run), "--only", "wandb", "--follow"],
        env={**os.environ, **server.environment, "CLM_DIST_FOLLOWED": str(os.getpid())},
        stdin=subprocess.PIPE,
    )


def start_sync(server, run: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "clm_dist", "sync", str(run)],
        env={**os.environ, **server.environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def sync_with(server, run: Path, behaviour: str):
    server.behave(behaviour)
    try:
        return run_command("sync", run, env=server.environment)
    finally:
        server.behave("well")


def couriers_of(run: Path) -> list[str]:
    """Processes that follow this run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run).encode() in words and b"--follow" in words:
            found.append(path.parent.name)
    time.sleep(0.1)
    return found
