"""Launches that are kept for several cases (distributed/warm.py); `launch_warm` of conftest.py gives them out."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from conftest import ROOT, Result, launch_command
from torch.distributed import TCPStore

WARM = Path(__file__).parent / "distributed" / "warm.py"
PATIENCE = 400  # seconds for one case
KEPT = 6  # launches at a time: a rank that waits holds what it has imported, a third of a GB


class Launched:
    """So many processes, launched once by `accelerate launch`; each case is a fork of each of them (warm.py)."""

    def __init__(self, folder: Path, processes: int, config: str):
        self.folder, self.processes, self.count = folder, processes, 0
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment = {**inherited, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": "1"}
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            launch_command(processes, [str(WARM), str(folder)], config),
            cwd=ROOT, env=environment, stdout=self.log, stderr=self.log, start_new_session=True,
        )  # fmt: skip

    def run(self, program: list[str], env: dict[str, str], cwd: Path) -> Result:
        """One case, to its end: the code of a rank that failed by itself, if one did, and what all of them said."""
        name, self.count = str(self.count), self.count + 1
        # a store for each case, held here as by the launcher's agent, whose own remembers the group of the case before
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        own = own if self.processes > 1 else {}
        staged = self.folder / f".{name}.json"
        staged.write_text(json.dumps({"program": program, "env": {**env, **own}, "cwd": str(cwd)}))
        staged.rename(self.folder / f"{name}.json")
        codes = [self.folder / f"{name}-{rank}.code" for rank in range(self.processes)]
        end = time.monotonic() + PATIENCE
        while not all(code.exists() for code in codes):
            assert self.process.poll() is None and time.monotonic() < end, (self.folder / "log").read_text()
            time.sleep(0.05)
        said = [
            "".join((self.folder / f"{name}-{rank}.{kind}").read_text() for rank in range(self.processes))
            for kind in ("out", "err")
        ]
        left = [int(code.read_text()) for code in codes]
        return Result(next((code for code in (max(left), min(left)) if code), 0), *said)

    def dismiss(self) -> None:
        """Says that there are no more cases."""
        (self.folder / f"{self.count}.json").write_text("null")

    def end(self) -> None:
        """Until all have left."""
        self.dismiss()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()
