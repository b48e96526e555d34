"""The commands as the command line shows them: what each takes, its options, and what an interruption leaves."""

import argparse
from typing import Any

DESCRIPTION = """Train causal language models on many processes: exact order, exact loss, exact perplexity.

  clm-dist prepare  RECIPE   text to blocks of token ids on disk, once
  clm-dist data inspect DIR  what prepared data holds; data verify DIR: whether it is what was written
  clm-dist plan     RECIPE   what of it fits on which GPUs, and the command to launch it
  clm-dist train    RECIPE   train, evaluate, export; many processes by `accelerate launch ... -m clm_dist train RECIPE`
  clm-dist submit   RECIPE   the same as a Slurm job, on any number of nodes
  clm-dist status   RUN      how a run is doing: in the queue, running, saved, finished, failed; progress and time left
  clm-dist check    RECIPE   whether a launch learns what one plain process would, on the first steps
  clm-dist evaluate RECIPE   exact loss and perplexity of any model on the recipe's held-out text
  clm-dist verify   RUN      whether every block was seen as planned, over all restarts; where the time went
  clm-dist replay   RUN STEP a step whose loss or gradient was bad, again
  clm-dist generate MODEL    text from a model folder or Hub id
  clm-dist architectures     what was proved of each architecture, and what the causal-LM guide does not say
  clm-dist report   RUN      one HTML page of a run
  clm-dist sync     RUN      to dashboards what has not arrived there, from any machine with a route
  clm-dist push     RUN      its model to the Hugging Face Hub: what training could not, or any time later

`clm-dist COMMAND --help` shows each command's settings."""

REVISION = {"help": "commit or tag of the model on the Hub (default: the newest)"}
DEEPSPEED = {
    "metavar": "JSON",
    "help": "DeepSpeed configuration, where another launcher than Accelerate's started the processes",
}
SUBMIT: dict[str, dict[str, Any]] = {
    "--nodes": {"type": int, "default": 1, "metavar": "N", "help": "nodes (default 1)"},
    "--gpus-per-node": {
        "type": int,
        "default": 0,
        "metavar": "G",
        "help": "GPUs of each; one process each (default 0)",
    },
    "--processes-per-node": {"type": int, "metavar": "P", "help": "processes of each node, where there are no GPUs"},
    "--time": {"default": "4:00:00", "metavar": "H:MM:SS", "help": "time limit of one start (default 4:00:00)"},
    "--config": {
        "default": "ddp",
        "metavar": "FILE",
        "help": "Accelerate YAML, or the name of one in accelerate_configs/: ddp, zero2, fsdp2, ... (default ddp)",
    },
    "--partition": {"metavar": "NAME", "help": "Slurm's partition (default: the site's)"},
    "--account": {"metavar": "NAME", "help": "Slurm's account"},
    "--qos": {"metavar": "NAME", "help": "Slurm's quality of service"},
    "--cpus-per-task": {"type": int, "metavar": "N", "help": "cores of each node, shared by its processes"},
    "--mem": {"metavar": "SIZE", "help": "memory of each node, e.g. 200G; 0: all of it"},
    "--signal": {
        "type": int,
        "default": 120,
        "metavar": "SECONDS",
        "help": "before the time limit, when the run is told to save (default 120; longer for models that save slowly)",
    },
    "--preemptible": {
        "action": "store_true",
        "help": "saves and queues itself again when it has to leave; as --requeue 100",
    },
    "--requeue": {"type": int, "metavar": "MAX", "help": "the same, so many times at most"},
    "--array": {
        "action": "append",
        "default": [],
        "metavar": "KEY=V,V",
        "help": "a run for each value, in RUN/0, RUN/1, ...; given several times: for each combination",
    },
    "--prepare": {"type": int, "metavar": "N", "help": "an array job that prepares the data in N shards instead"},
    "--stage": {"action": "store_true", "help": "copy prepared data to the local disk of each node, and read it there"},
    "--setup": {
        "action": "append",
        "default": [],
        "metavar": "LINE",
        "help": "a shell line before the run, e.g. 'module load cuda'; may be given several times",
    },
    "--dry-run": {"action": "store_true", "help": "print the batch file; write and submit nothing"},
}
# command -> summary, what it is given, what that is, options
COMMANDS: dict[str, tuple[str, str, str, dict[str, dict[str, Any]]]] = {
    "prepare": (
        *("text to blocks of token ids on disk", "RECIPE", "YAML recipe"),
        {
            "--workers": {"type": int, "metavar": "N", "help": "processes that tokenise (default: one a core)"},
            "--encoder": {
                "choices": ("fastokens", "tiktoken", "tokenizers", "transformers"),
                "help": "what tokenises (default: the fastest that gives the tokenizer's own ids; they are the same)",
            },
            "--shard": {
                "metavar": "I/N",
                "help": "do only part I (from 0) of N, as a job array does; who comes last puts all parts together",
            },
            "--status": {"action": "store_true", "help": "say what is done and what is missing; do nothing"},
        },
    ),
    "data inspect": (
        *("manifest, lengths and single blocks of prepared data", "FOLDER", "prepared data (data.prepared_dir)"),
        {
            "--block": {"type": int, "metavar": "N", "help": "show the text of this block (from 0)"},
            "--split": {"choices": ("train", "eval"), "default": "train", "help": "of this split (default train)"},
        },
    ),
    "data verify": (
        *("reread prepared data against its check sums", "FOLDER", "prepared data (data.prepared_dir)"),
        {},
    ),
    "plan": (
        *(
            "memory, communication and time on GPUs that you need not have; and which way to launch",
            "RECIPE",
            "YAML recipe",
        ),
        {
            "--gpus": {"type": int, "required": True, "metavar": "N", "help": "GPUs of all nodes together"},
            "--gpu-memory": {"type": float, "required": True, "metavar": "GIB", "help": "memory of each, e.g. 80"},
            "--nodes": {"type": int, "default": 1, "metavar": "N", "help": "machines that they stand in (default 1)"},
            "--cpu-memory": {"type": float, "metavar": "GIB", "help": "memory of each machine, for offload"},
            "--tflops": {
                "type": float,
                "metavar": "X",
                "help": "10^12 operations a second that one GPU really does, measured or stated; for times",
            },
            "--json": {"action": "store_true", "help": "everything as JSON, in bytes and seconds"},
        },
    ),
    "train": (
        *("train, evaluate each epoch, export", "RECIPE", "YAML recipe"),
        {
            "--dry-run": {
                "action": "store_true",
                "help": "check everything, print the arithmetic, start nothing (WORLD_SIZE=N: as N processes)",
            },
            "--overwrite": {"action": "store_true", "help": "replace the run in run_dir, if there is one"},
            "--deepspeed": DEEPSPEED,
        },
    ),
    "submit": (*("a recipe as a Slurm job: checked, copied, submitted", "RECIPE", "YAML recipe"), SUBMIT),
    "status": (
        *("how a run is doing, from its folder and from Slurm; reads only", "RUN", "run folder"),
        {"--json": {"action": "store_true", "help": "everything as JSON"}},
    ),
    "check": (
        *("whether this launch learns what one plain process would; begins no run", "RECIPE", "YAML recipe"),
        {"--deepspeed": DEEPSPEED},
    ),
    "replay": (
        *("an offending step of a run again, in one process", "RUN", "run folder"),
        {"step": {"type": int, "metavar": "STEP", "help": "one of those in RUN/offending"}},
    ),
    "verify": (
        *("whether a run did what it says: data, checkpoints, metrics; and where its time went", "RUN", "run folder"),
        {},
    ),
    "evaluate": (
        *("exact loss and perplexity on the held-out text", "RECIPE", "YAML recipe, or a run's config.yaml"),
        {
            "--model": {"help": "model folder or Hub id (default: the recipe's run_dir/model)"},
            "--revision": REVISION,
            "--output": {
                "help": "JSON file for the figures (default, for the run's own model: run_dir/evaluation.json)"
            },
        },
    ),
    "architectures": (
        *("what was proved of each architecture, with which version of transformers", "", ""),
        {
            "type": {
                "nargs": "?",
                "metavar": "TYPE",
                "help": "everything of this one, e.g. bert (default: all, a line each)",
            },
            "--json": {"action": "store_true", "help": "everything as JSON"},
            "--markdown": {"action": "store_true", "help": "the tables of docs/architectures.md"},
        },
    ),
    "generate": (
        *("text from a model", "MODEL", "model folder or Hub id"),
        {
            "overrides": {"nargs": "*", "metavar": "generate.field=value", "help": "e.g. generate.top_k=40"},
            "--prompt": {"action": "append", "default": [], "help": "text to continue; may be given several times"},
            "--prompts-file": {"help": "file with one prompt a line"},
            "--revision": REVISION,
            "--output": {"help": "write JSON lines {prompt, text} here instead of the terminal"},
            "--seed": {"type": int, "default": 42, "help": "the same seed gives the same text (default 42)"},
        },
    ),
    "report": (
        *("one self-contained HTML page of a run", "RUN", "run folder"),
        {"--output": {"help": "HTML file (default: RUN/report.html)"}},
    ),
    "sync": (
        *(
            "deliver what waits in a run folder; may be interrupted and repeated, also while it trains",
            "RUN",
            "run folder",
        ),
        {
            "--only": {"metavar": "NAME", "help": "this destination only, e.g. wandb (default: all of the recipe's)"},
            "--status": {"action": "store_true", "help": "say what has arrived and what waits; deliver nothing"},
            "--follow": {"action": "store_true", "help": argparse.SUPPRESS},  # how training starts its couriers
        },
    ),
    "push": (
        *("a run's model to the Hugging Face Hub; what waits in its outbox first", "RUN", "run folder"),
        {
            "--repo": {"metavar": "OWNER/NAME", "help": "repository (default: the recipe's publish.hub.repo)"},
            "--what": {"choices": ("model", "model_best"), "help": "push this one (default: what waits, or model)"},
            "--private": {"action": "store_true", "default": None, "help": "make it private (default: as the recipe)"},
            "--public": {"action": "store_false", "dest": "private", "default": None, "help": "all may see it"},
            "--branch": {"metavar": "NAME", "help": "branch (default: the recipe's publish.hub.branch)"},
            "--replace": {
                "action": "store_true",
                "default": None,
                "help": "commit over another model, if there is one",
            },
        },
    ),
}
INTERRUPTED = {
    "prepare": "what was finished is kept, and the same command goes on from there",
    "data inspect": "nothing was written",
    "data verify": "nothing was written",
    "plan": "nothing was written",
    "train": "nothing was trained yet",
    "check": "nothing was written",
    "replay": "nothing was written",
    "submit": "`squeue` shows whether it is in the queue",
    "status": "nothing was written",
    "verify": "nothing was written",
    "evaluate": "nothing was written",
    "architectures": "nothing was written",
    "generate": "texts finished before are kept",
    "report": "nothing was written",
    "push": "what waits is kept, and the same command goes on with it",
    "sync": "what has arrived is noted, and the same command delivers the rest",
}
