"""What each command does, in terms of the wings: one function each, found by the command's name."""

from clm_dist.commands.architectures import architectures
from clm_dist.commands.cluster import status, submit
from clm_dist.commands.data import data_inspect, data_verify, prepare
from clm_dist.commands.pushing import push
from clm_dist.commands.results import evaluate, generate, report, verify
from clm_dist.commands.sync import sync
from clm_dist.commands.training import check, plan, replay, train

__all__ = [
    "architectures", "check", "data_inspect", "data_verify", "evaluate", "generate", "plan", "prepare", "push", "replay",
    "report", "status", "submit", "sync", "train", "verify",
]  # fmt: skip
