"""What the processes of a job have to know, found out on its first node; for the batch file to eval.

    eval "$(python -m clm_dist.cluster.environment PROCESSES_PER_NODE)"

What the user has set stays. Nothing is said of CUDA_VISIBLE_DEVICES (Slurm's, and one task has all GPUs of its node), nor of
NCCL's interfaces and transports: which are right is a matter of the site, and NCCL finds them.
"""

import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from clm_dist.errors import UserError

PORTS = range(20000, 32000)  # below those that the kernel gives to outgoing connections
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
PATIENCE = 0.9  # seconds that a route may take to answer
# where a run would go, its variable, and what to set where there is no route
ENDPOINTS = (
    ("HF_ENDPOINT", "https://huggingface.co", "HF_HUB_OFFLINE", "1"),
    ("WANDB_BASE_URL", "https://api.wandb.ai", "WANDB_MODE", "offline"),
)


def port_of(job: int, restart: int) -> int:
    """Where this start of a job begins to look: jobs side by side, and the starts of one, begin at different ports."""
    return PORTS[(job * 97 + restart * 7) % len(PORTS)]


def free_port(first: int) -> int:
    """The first port from `first` on that nobody listens at on this machine."""
    for number in range(len(PORTS)):
        port = PORTS[(first - PORTS[0] + number) % len(PORTS)]
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("", port))
                return port
            except OSError:
                continue
    raise UserError(f"no port from {PORTS[0]} to {PORTS[-1]} is free on {socket.gethostname()}; set MASTER_PORT")


def first_host(environment: Mapping[str, str]) -> str:
    """The first node of the job, which the batch file runs on."""
    command = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]


def cores(environment: Mapping[str, str]) -> int:
    """Those that the job has on each node."""
    return int(environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE") or 1)


def reachable(urls: list[str], environment: Mapping[str, str]) -> dict[str, bool]:
    """Which of these answer to a connection, asked all at once and for less than a second."""
    found = dict.fromkeys(urls, False)

    def ask(url: str) -> None:
        proxy = environment.get("HTTPS_PROXY") or environment.get("https_proxy")
        parts = urlsplit(proxy if proxy and url.startswith("https") else url)
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            with socket.create_connection((parts.hostname or "", port), timeout=PATIENCE):
                found[url] = True
        except (OSError, ValueError):
            pass

    askers = [threading.Thread(target=ask, args=(url,), daemon=True) for url in urls]
    for asker in askers:
        asker.start()
    deadline = time.monotonic() + PATIENCE
    for asker in askers:  # a name server that hangs is waited for no longer
        asker.join(max(0.0, deadline - time.monotonic()))
    return dict(found)


def offline(environment: Mapping[str, str]) -> tuple[dict[str, str], str | None]:
    """What to set where there is no route out, and the line that says so."""
    asked = {
        environment.get(variable) or default: (name, value)
        for variable, default, name, value in ENDPOINTS
        if name not in environment
    }
    answers = reachable(list(asked), environment)
    lost = [url for url, answered in answers.items() if not answered]
    settings = dict(asked[url] for url in lost)
    if not settings:
        return {}, None
    shown = " ".join(f"{name}={value}" for name, value in settings.items())
    what = f"no route to {', '.join(urlsplit(url).hostname or url for url in lost)}: {shown}"
    return settings, f"{what}; what has to leave waits in the run folder for `clm-dist sync RUN` on a login node"


def settings(environment: Mapping[str, str], processes: int) -> dict[str, str]:
    """The variables of this start of the job, without those that tell of routes."""
    job, restart = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT") or 0)
    found = {
        "MASTER_ADDR": first_host(environment),
        "OMP_NUM_THREADS": str(max(1, cores(environment) // processes)),
        "PET_SIGNALS_TO_HANDLE": SIGNALS,  # else SIGUSR1 would kill the launcher
        "NCCL_DEBUG": "WARN",  # says what failed; without it, nothing
    }
    if "SLURM_CPUS_PER_TASK" in environment:  # srun no longer takes it from the job (Slurm 22.05)
        found["SRUN_CPUS_PER_TASK"] = environment["SLURM_CPUS_PER_TASK"]
    found["MASTER_PORT"] = str(free_port(port_of(job, restart)))
    return {name: environment.get(name) or value for name, value in found.items()}


def main() -> None:
    """Prints `export NAME=VALUE` lines; what there is to say goes to the log."""
    processes = int(sys.argv[1])
    routes, line = offline(os.environ)
    found = {**settings(os.environ, processes), **routes}
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in found.items()), flush=True)
    if line:
        print(line, file=sys.stderr, flush=True)
    if cores(os.environ) < processes:
        print(
            f"{cores(os.environ)} cores for {processes} processes: ask for more, --cpus-per-task",
            file=sys.stderr,
            flush=True,
        )
    os._exit(0)  # a thread may still wait for a name server


if __name__ == "__main__":
    main()
