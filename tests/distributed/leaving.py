"""Ranks that leave while a thread of gloo has a reduction to let go of, as happens by itself on a busy machine.

Launched by test_exit.py. Whoever lets go of the process group last waits for that thread, and the thread needs Python's
lock to let go of a tensor: if the last is DDP's reducer, which is freed with the lock held, neither goes on.
"""

import gc
import os

import torch
import torch.distributed as dist

from clm_dist.training.runtime import finish, start

accelerator = start("no")
model = accelerator.prepare(torch.nn.Linear(4, 4))
numbers = torch.ones(30_000_000)
dist.all_reduce(numbers, async_op=True)
accelerator.wait_for_everyone = lambda: None  # which would wait for the reduction too, but not for what comes after it
finish(accelerator)
del model, accelerator
gc.collect()
print("left", flush=True)
os._exit(0)
