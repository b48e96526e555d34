"""Every command of the README and of the pages in NAMES runs, in their order, in a copy of the repository.

The Hub's place is taken by the local stand-in with a tiny model and data set of the same names, so that what the reader
types is what runs. `make test` is what runs this.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import BIN, ROOT
from local_hub import LocalHub, write_data, write_model
from test_hub import DATA, MODEL

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1800)]

NAMES = (
    "README.md",
    "docs/data.md",
    "docs/recovery.md",
    "docs/planning.md",
    "docs/sharding.md",
    "docs/tracking.md",
    "docs/lora.md",
)
PAGES = "".join((ROOT / name).read_text(encoding="utf-8") for name in NAMES)
# of recipes, in the copy: what takes minutes, and no command depends on
SHORTER = {
    "demo.yaml": {
        "epochs: 14": "epochs: 2",
        "n_layer: 4, n_embd: 128, n_head: 4": "n_layer: 2, n_embd: 32, n_head: 2",
        "max_new_tokens: 80": "max_new_tokens: 8",
    },
    "eli5_distilgpt2.yaml": {"epochs: 3": "max_steps: 10", "max_new_tokens: 100": "max_new_tokens: 8"},
}
SHARDED = {"zero2", "zero3", "by_deepspeed", "zero_nodes"}
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGES, re.DOTALL) for line in block.splitlines() if line]


def test_the_readme_shows_commands_for_each_job():
    for needle in (
        "make demo",
        "clm-dist prepare",
        "clm-dist data verify",
        "--shard 1/2",
        "accelerate launch",
        "--num_machines 2",
        "launch/local.sh",
        "report",
    ):
        assert any(needle in command for command in COMMANDS), needle


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.soak)], ids=["shorter", "as_shipped"])
def shorter(request):
    return request.param


@pytest.fixture
def copy(shorter, tmp_path_factory):
    """The repository as a reader has it: what git tracks, as it stands here; but for what is SHORTER in the slow suite."""
    folder = tmp_path_factory.mktemp("readme") / "clm-dist"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    if shorter:
        shorten(folder)
    return folder


def shorten(folder: Path) -> None:
    """SHORTER recipes; and an environment that finds the packages of this one: pip has but the program to install."""
    for name, changes in SHORTER.items():
        text = (folder / "recipes" / name).read_text()
        for long, short in changes.items():
            assert long in text, long
            text = text.replace(long, short)
        (folder / "recipes" / name).write_text(text)
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True)
    [packages] = (folder / ".venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")


def test_every_command_of_the_readme_runs(launch_warm, shorter, copy, tmp_path):
    """In the slow suite `clm-dist` and a subcommand are typed once, as is a file for `accelerate launch`; the further lines
    with it run in processes that have imported the packages (`launch_warm`)."""
    typed = set()
    write_data(tmp_path / "data")
    write_model(tmp_path / "model")
    with LocalHub(models={MODEL: tmp_path / "model"}, datasets={DATA: tmp_path / "data"}) as hub:
        environment = {
            **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        for command in COMMANDS:
            if command == "make test":
                continue  # what runs this
            if command.startswith("clm-dist plan recipes/eli5_distilgpt2.yaml"):
                continue  # test_planning_page.py runs these, and compares what they print
            program, *arguments = shlex.split(command, comments=True)
            beginning = (program, *arguments[: 2 if arguments[0] in ("data", "launch") else 1])
            processes, config = 1, "ddp"
            if program == "accelerate":
                beginning += (arguments[2],)
                processes, config = 2, Path(arguments[2]).stem
                arguments = arguments[arguments.index("clm_dist") + 1 :]
            of_the_hub = "eli5" in command  # whose address a process must have from its beginning
            if shorter and program in ("clm-dist", "accelerate") and beginning in typed and not of_the_hub:
                done = launch_warm(processes, *arguments, env=environment, cwd=copy, config=config)
                assert done.code == 0, f"{command}\n{done.out}{done.err}"
            else:
                run(command, copy, environment)
            typed.add(beginning)
    made = {path.name for path in (copy / "runs").iterdir()}
    assert (
        made
        == {
            "demo",
            "eli5_distilgpt2",
            "two",
            "local",
            "nodes",
            "watched",
            "again",
            "long",
            "again-and-again",
            "lora",
            "bert",
        }
        | SHARDED
    )
    assert (copy / "best.json").is_file() and (copy / "runs" / "demo" / "report.html").is_file()
    first, again = ((copy / "runs" / name / "metrics.jsonl").read_text() for name in ("watched", "again"))
    losses = [re.findall(r'"(?:train|eval)/loss": ([\d.]+)', text) for text in (first, again)]
    assert losses[0] == losses[1] and losses[0]


def run(command: str, folder: Path, environment: dict[str, str]) -> None:
    """One line of the README; a line for each of two nodes is run on both at once, here on one machine."""
    nodes = range(2) if "$NODE_RANK" in command else [None]
    processes = []
    for node in nodes:
        extra = {} if node is None else {"NODE_RANK": str(node), "MAIN_HOST": "127.0.0.1"}
        processes.append(
            subprocess.Popen(
                ["bash", "-c", command], cwd=folder, env={**environment, **extra},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    for process in processes:
        out, _ = process.communicate(timeout=900)
        assert process.returncode == 0, f"{command}\n{out}"
