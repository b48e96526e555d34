"""What speed.py compares with: three ways to train the same model on the same blocks, as their users write them."""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from clm_dist.data.blocks import Blocks
from clm_dist.data.order import global_batch


class Clock:
    """Tokens/s without the first fifth of the steps."""

    def __init__(self, recipe: dict) -> None:
        train = recipe["train"]
        self.steps, self.begin, self.end = train["max_steps"], train["log_every"], 0.0
        self.tokens = (self.steps - self.begin) * train["global_batch_size"] * recipe["data"]["block_size"]

    def step(self, done: int) -> None:
        """So many steps are done."""
        if done in (self.begin, self.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.end, self._since = (now, self._since) if done == self.steps else (0.0, now)

    def speed(self) -> float:
        return self.tokens / (self.end - self._since)


def model_and_rows(recipe: dict):
    """The model with random weights, and the blocks of every step: (steps, B, T)."""
    torch.manual_seed(42)
    built = AutoConfig.for_model(recipe["model"]["type"], **recipe["model"]["config"])
    train, blocks = recipe["train"], Blocks(Path(recipe["data"]["prepared_dir"]) / "train")
    batch = train["global_batch_size"]
    rows = [blocks[global_batch(step, batch, len(blocks), 42)].astype("int64") for step in range(train["max_steps"])]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(built)
    if train.get("activation_checkpointing"):
        model.gradient_checkpointing_enable()
    return model.float(), torch.stack([torch.from_numpy(one) for one in rows])


def trainer(recipe: dict) -> dict[str, float]:
    """The guide's script."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.step(state.global_step)

    clock, train = Clock(recipe), recipe["train"]
    model, rows = model_and_rows(recipe)
    arguments = TrainingArguments(
        f"{recipe['run_dir']}.trainer", per_device_train_batch_size=train["global_batch_size"],
        max_steps=train["max_steps"], learning_rate=recipe["optim"]["lr"], weight_decay=0.01, save_strategy="no",
        logging_steps=train["log_every"], report_to="none", bf16=train["mixed_precision"] == "bf16",
        use_cpu=not torch.cuda.is_available(), train_sampling_strategy="sequential", disable_tqdm=True,
        gradient_checkpointing=bool(train.get("activation_checkpointing")),
    )  # fmt: skip
    flat = rows.flatten(0, 1)
    data = [{"input_ids": one, "labels": one} for one in flat]
    made = Trainer(model, arguments, train_dataset=data, callbacks=[Steps()])
    made.train()
    loss = [row["loss"] for row in made.state.log_history if "loss" in row][-1]
    return {"tokens/s": clock.speed(), "loss": loss}


def no_trainer(recipe: dict) -> dict[str, float]:
    """The loop of the public no-trainer example: Accelerate, a scheduler, the model's own loss, no clipping."""
    from accelerate import Accelerator
    from transformers import default_data_collator, get_scheduler

    clock, train = Clock(recipe), recipe["train"]
    precision = train["mixed_precision"]
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
    model, rows = model_and_rows(recipe)
    data = [{"input_ids": one, "labels": one} for one in rows.flatten(0, 1)]
    loader = torch.utils.data.DataLoader(data, batch_size=train["global_batch_size"], collate_fn=default_data_collator)
    plain = ("bias", "layer_norm.weight")
    groups = [
        {"params": [p for n, p in model.named_parameters() if not any(w in n for w in plain)], "weight_decay": 0.01},
        {"params": [p for n, p in model.named_parameters() if any(w in n for w in plain)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe["optim"]["lr"])
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=train["max_steps"])
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    total = 0.0
    for done, batch in enumerate(loader, start=1):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            total += loss.detach().float()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        clock.step(done)
    return {"tokens/s": clock.speed(), "loss": loss.item()}


def minimal(recipe: dict) -> dict[str, float]:
    """By hand: fused AdamW, clipping, one autocast; compiled on a GPU, as nanoGPT does. What the machine can do, about."""
    clock, train = Clock(recipe), recipe["train"]
    model, rows = model_and_rows(recipe)
    device = next(model.parameters()).device
    torch.set_float32_matmul_precision("high")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe["optim"]["lr"], fused=True)
    model.config.use_cache = False
    run = torch.compile(model) if device.type == "cuda" else model
    low = train["mixed_precision"] == "bf16"
    for done, ids in enumerate(rows.to(device), start=1):
        for group in optimizer.param_groups:
            group["lr"] = recipe["optim"]["lr"] * (1 - (done - 1) / len(rows))
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            logits = run(input_ids=ids).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.step(done)
    return {"tokens/s": clock.speed(), "loss": loss.item()}
