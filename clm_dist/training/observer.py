"""What happens around the updates: log lines, evaluations, samples, exports. The loop itself stays bare."""

import json
import math
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from clm_dist.config import Config
from clm_dist.engine.engine import Engine
from clm_dist.model import lora
from clm_dist.model.configuration import told
from clm_dist.model.generate import generate
from clm_dist.model.positions import max_positions
from clm_dist.publish import outbox
from clm_dist.publish.courier import Couriers, destinations
from clm_dist.publish.export import export
from clm_dist.publish.rows import METRICS, SAMPLES, MetricsFile
from clm_dist.training import publishing
from clm_dist.training.batches import Batches
from clm_dist.training.evaluate import evaluate
from clm_dist.training.job import Job
from clm_dist.training.keeper import Keeper
from clm_dist.training.meter import Meter, evaluation_line, train_line
from clm_dist.training.profiler import Profiler

STEP = "outbox/step"  # in the run folder: an export on its way
STOPPED = 5.0  # seconds that a run which was told to stop waits for its couriers


class Observer:
    """Watches a run and writes its folder. Every rank has one and makes every call; the main process writes."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        job: Job,
        engine: Engine,
        keeper: Keeper,
        told: Iterable[str | None] = (),
    ) -> None:
        self.accelerator = accelerator
        self.config = config
        self.job = job
        self.plan = job.plan
        self.engine = engine
        self.keeper, self.state, self.watch = keeper, keeper.state, keeper.watch
        self.meter = Meter(job.plan, engine.recorded)
        self.folder = Path(config.run_dir)
        self.facts: dict[str, Any] = {"engine": engine.name}  # of the model
        self._told = [line for line in told if line is not None]  # what else to say of it at the beginning
        steps = config.train.profile_steps if accelerator.is_main_process else None
        self.profiler = Profiler(steps, self.folder)
        self.metrics: MetricsFile | None = None  # these two on the main process
        self.couriers: Couriers | None = None

    def begin(self) -> None:
        """Prints the arithmetic, starts the couriers, evaluates where that is due: the model as it comes, or what an
        interruption left out."""
        if self.accelerator.is_main_process:
            self.metrics = MetricsFile(self.folder / METRICS)
            self.keeper.tracker_ids = outbox.identify(self.folder, self.keeper.tracker_ids)
            self.couriers = Couriers(self.folder, self.config, self.say)
            self.couriers.start(destinations(self.config))
        plain = self.engine.plain
        trained, frozen = (
            sum(getattr(one, "ds_numel", one.numel()) for one in plain.parameters() if one.requires_grad == wanted)
            for wanted in (True, False)
        )
        where = f"on {self.accelerator.device.type}, {self.engine.name}"
        if self.config.model.lora is None:
            self.facts |= {"parameters": trained + frozen}
            self.say(f"{type(plain).__name__}, {trained + frozen:,} parameters, {where}")
        else:
            adapters = lora.told(self.config.model.lora, plain)
            self.facts |= {"parameters": frozen, "trained": trained, "adapters": adapters}
            self.say(f"{type(plain).__name__}, {frozen:,} parameters, frozen, {where}")
            self.say(f"{adapters}: {trained:,} parameters, which are trained")
        if (line := told(self.job.model_configuration)) is not None:
            self.say(line)
        if self.config.model.pad_vocab_to_multiple_of:
            rows = plain.config.get_text_config().vocab_size
            self.say(f"embedding of {rows:,} rows for {self.job.manifest.vocab_size:,} tokens")
        for line in self._told:
            self.say(line)
        if (why := self.engine.objective.why) is not None:
            self.say(f"logits are computed whole, not by chunks: {why}")
        self.say(str(self.plan))
        for line in self.job.sharding.lines():
            self.say(line)
        self.meter.know_device(self.config.model, self.job.model_configuration)
        self.evaluate_if_due()
        self.profiler.look(self.state.step)
        self.keeper.logbook.mark()
        self.meter.resume()

    def after_step(self, lr: float, grad_norm: torch.Tensor) -> None:
        """Whatever is due once `state.step` updates are done."""
        step = self.state.step
        self.meter.steps += 1
        self.meter.data_seconds += self.keeper.logbook.data_seconds
        if step % self.config.train.log_every == 0 or step == self.plan.max_steps:
            metrics = self.meter.read(self.state, lr, grad_norm)
            self.log(step, metrics)
            self.say(train_line(step, metrics, self.plan))
        self.meter.pause()
        if (told := self.profiler.look(step)) is not None:
            self.say(told)
        self.evaluate_if_due()
        self.keeper.after_step(lr)
        self.push_if_due()
        self.meter.resume()

    def end(self) -> None:
        """The final export, and where everything lies."""
        self.export("model")
        if self.config.publish.hub.when != "best":
            self.push("model")
        self.close("finished")
        self.keeper.logbook.end(self.state.step, "finished")
        self.say(f"done: {self.folder}/model is the model, {self.folder}/metrics.jsonl the figures")
        model, prompt = self.folder / "model", next(iter(self.config.generate.prompts), "The")
        report, generate = ("report", str(self.folder)), ("generate", str(model), "--prompt", prompt)
        self.say("next: " + "   ".join(shlex.join(("clm-dist", *command)) for command in (report, generate)))

    def close(self, reason: str = "stopped") -> None:
        """No more rows: waits a bounded time until what was written has arrived where it should; less when told to stop."""
        if (told := self.profiler.end(self.state.step)) is not None:
            self.say(told)
        if self.metrics is not None and self.couriers is not None:
            self.metrics.finish()
            with self.watch.during("delivering"):
                self.couriers.end(reason, float("inf") if reason == "finished" else STOPPED)

    def evaluate_if_due(self) -> None:
        """Evaluates this step unless that is done; keeps the model where it is the best so far."""
        state = self.state
        if state.evaluated == state.step or not (state.step == 0 or self.plan.evaluation_due(state.step)):
            return
        with self.watch.during("evaluation"), self.keeper.logbook.timed("evaluation", state.step):
            figures = self.evaluate()
            if self.keeper.leaving:
                return
            self.sample()
        state.evaluated, state.evaluation = state.step, figures
        loss = figures.get("eval/loss", math.nan)
        if state.step > 0 and math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss):
            state.best_loss = loss
            self.export("model_best")
            if self.config.publish.hub.when == "best":
                self.push("model_best")

    def evaluate(self) -> dict[str, float]:
        """Figures of the held-out blocks; none where there are no blocks, or all ranks agreed to leave."""
        if not len(self.job.eval_blocks):
            return {}
        result = evaluate(
            self.accelerator,
            self.engine.plain,
            self.engine.objective,
            Batches(self.job.eval_blocks, self.config.train.isolate_documents, self.accelerator.device),
            self.config.evaluate.micro_batch_size,
            self.job.manifest.tokens_per_byte("eval"),
            self.keeper.agreement.tick,
            self.engine.sharded,
        )
        if result is None:
            return {}
        figures = result.metrics()
        self.log(self.state.step, figures)
        self.say(evaluation_line(self.state.step, figures, self.plan))
        return figures

    def sample(self) -> None:
        """Continues the recipe's prompts."""
        plain = self.engine.plain
        for number, prompt in enumerate(self.config.generate.prompts):
            text = generate(
                plain,
                self.job.tokenizer,
                prompt,
                self.config.generate,
                self.config.seed + number,
                together=self.engine.sharded,
            )
            if self.accelerator.is_main_process:
                row = {"step": self.state.step, "prompt": prompt, "text": text}
                with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def export(self, name: str) -> None:
        """The model as it is, as a Hugging Face folder inside the run folder."""
        with self.watch.during("exporting"), self.keeper.logbook.timed("export", self.state.step):
            self._export(name)

    def _export(self, name: str) -> None:
        main = self.accelerator.is_main_process
        pages = publishing.pages(self.accelerator, self.config, self.job, self.state, self.facts) if main else {}
        sampling, positions = self.config.generate, max_positions(self.job.model_configuration)
        if positions is not None and sampling.max_new_tokens >= positions:  # `pipeline` would run past the last
            sampling = sampling.model_copy(update={"max_new_tokens": positions // 2})
        held = {name: tensor for name, tensor in self.engine.full_weights() if tensor is not None}
        if self.config.model.lora is not None and main:
            pages |= publishing.adapter(self.config, self.engine.plain, held)
            held = lora.merged(self.engine.plain, held)
        export(self.engine.plain, held.items(), self.job.tokenizer, self.folder / name, pages, sampling, main)

    def push_if_due(self) -> None:
        """Exports and queues this step where the recipe says so; the last one is pushed when it is finished."""
        every = self.config.publish.hub.every_steps
        if every and self.state.step % every == 0 and self.state.step < self.plan.max_steps and not self.keeper.leaving:
            self.export(STEP)
            self.push(STEP)
            if self.accelerator.is_main_process:
                publishing.drop(self.folder / STEP)

    def push(self, name: str) -> None:
        """Puts an exported model into the outbox: a courier takes it to the Hub."""
        if self.config.publish.hub.repo is not None and self.accelerator.is_main_process:
            what = "model" if name == STEP else name
            with self.watch.during("exporting"):
                problem = publishing.queue_push(self.config, self.folder / name, what)
            if problem is not None:
                self.say(problem)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One row to metrics.jsonl, from where couriers take it (on the main process)."""
        if self.metrics is not None and self.couriers is not None:
            self.metrics.log(metrics, step)
            self.couriers.look()

    def say(self, line: str) -> None:
        """A line on the screen, once."""
        if self.accelerator.is_main_process:
            print(line, flush=True)
