"""What happens around the updates: log lines, evaluations, samples, exports. The loop itself stays bare."""

import json
import shlex
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from clm_dist.config import Config
from clm_dist.model.build import max_positions
from clm_dist.model.generate import generate
from clm_dist.publish.card import model_card
from clm_dist.publish.export import export
from clm_dist.publish.trackers import Tracker, open_trackers
from clm_dist.training import run_folder
from clm_dist.training.batches import Batches
from clm_dist.training.evaluate import evaluate
from clm_dist.training.job import Job
from clm_dist.training.meter import Meter, evaluation_line, train_line


class Observer:
    """Watches a run and writes its folder. Every rank has one and makes every call; the main process writes."""

    def __init__(
        self, accelerator: Accelerator, config: Config, job: Job, model: torch.nn.Module, meter: Meter
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.job = job
        self.plan = job.plan
        self.model = model
        self.meter = meter
        self.folder = Path(config.run_dir)
        self.trackers: list[Tracker] = []
        self.evaluation: dict[str, float] = {}  # of the newest evaluation
        self.best_loss = float("inf")

    def begin(self) -> None:
        """Fills the run folder, prints the arithmetic, evaluates the model as it comes."""
        if self.accelerator.is_main_process:
            base_model_commit = getattr(self.job.model_configuration, "_commit_hash", None)
            run_folder.create(self.config, self.accelerator, base_model_commit, self.job.overwrite)
            self.trackers = open_trackers(self.config, self.folder)
        plain = self.accelerator.unwrap_model(self.model)
        self.parameters = sum(parameter.numel() for parameter in plain.parameters())
        self.say(f"{type(plain).__name__}, {self.parameters:,} parameters, on {self.accelerator.device.type}")
        self.say(str(self.plan))
        self.evaluate_and_sample(step=0)
        self.meter.resume()

    def after_step(self, step: int, lr: float, grad_norm: torch.Tensor) -> None:
        """Whatever is due once `step` updates are done."""
        if step % self.config.train.log_every == 0 or step == self.plan.max_steps:
            metrics = self.meter.read(step, lr, grad_norm)
            self.log(step, metrics)
            self.say(train_line(step, metrics, self.plan))
        if self.plan.evaluation_due(step):
            self.meter.pause()
            self.evaluate_and_sample(step)
            if self.evaluation and self.evaluation["eval/loss"] < self.best_loss:
                self.best_loss = self.evaluation["eval/loss"]
                self.export("model_best", step)
            self.meter.resume()

    def end(self) -> None:
        """The final export, and where everything lies."""
        self.export("model", self.plan.max_steps)
        for tracker in self.trackers:
            tracker.finish()
        self.say(f"done: {self.folder}/model is the model, {self.folder}/metrics.jsonl the figures")
        model, prompt = self.folder / "model", next(iter(self.config.generate.prompts), "The")
        report, generate = ("report", str(self.folder)), ("generate", str(model), "--prompt", prompt)
        self.say("next: " + "   ".join(shlex.join(("clm-dist", *command)) for command in (report, generate)))

    def evaluate_and_sample(self, step: int) -> None:
        """Evaluates on the held-out blocks, where there are any, and continues the recipe's prompts."""
        if len(self.job.eval_blocks):
            result = evaluate(
                self.accelerator,
                self.model,
                Batches(self.job.eval_blocks, self.config.train.isolate_documents, self.accelerator.device),
                self.config.evaluate.micro_batch_size,
                self.job.manifest.tokens_per_byte("eval"),
            )
            self.evaluation = result.metrics()
            self.log(step, self.evaluation)
            self.say(evaluation_line(step, self.evaluation, self.plan))
        plain = self.accelerator.unwrap_model(self.model)
        for number, prompt in enumerate(self.config.generate.prompts):
            text = generate(plain, self.job.tokenizer, prompt, self.config.generate, self.config.seed + number)
            if self.accelerator.is_main_process:
                with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")

    def export(self, name: str, step: int) -> None:
        """The model as it is, as a Hugging Face folder inside the run folder."""
        figures: dict[str, Any] = {
            **self.evaluation, "step": step, "arithmetic": str(self.plan), "parameters": self.parameters,
        }  # fmt: skip
        environment = run_folder.environment(self.accelerator)
        manifest = self.job.manifest
        prepared = {"tokenizer": manifest.tokenizer, "hub_ids": manifest.hub_ids(), **manifest.splits}
        card = model_card(self.config, figures, environment, prepared)
        sampling, positions = self.config.generate, max_positions(self.job.model_configuration)
        if positions is not None and sampling.max_new_tokens >= positions:  # `pipeline` would run past the last
            sampling = sampling.model_copy(update={"max_new_tokens": positions // 2})
        export(self.accelerator, self.model, self.job.tokenizer, self.folder / name, card, sampling)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One row to metrics.jsonl and every dashboard (none but on the main process)."""
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def say(self, line: str) -> None:
        """A line on the screen, once."""
        if self.accelerator.is_main_process:
            print(line, flush=True)
