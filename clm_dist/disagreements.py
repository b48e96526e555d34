"""What fields of the tree can be wrong about together. Pure."""

from collections.abc import Iterator

from clm_dist.config import Config, OptimConfig


def disagreements(config: Config) -> list[str]:
    """Problems between fields, each with its remedy; empty when the tree makes sense as a whole."""
    return [*_about_the_model(config), *_about_data(config), *_about_training(config), *_about_the_hub(config)]


def _about_the_model(config: Config) -> Iterator[str]:
    model = config.model
    if (model.name is None) == (model.type is None):
        given = f"model.name={model.name} and model.type={model.type} are given"
        yield f"{given}; set one of them: a name to load, or a type to build from scratch"
    if model.from_scratch and model.name is None:
        yield ("model.from_scratch=true needs model.name; model.type is always built from scratch: leave it out")
    if model.preset is not None and model.type is None:
        yield f"model.preset={model.preset} gives sizes to model.type; model.name has its own: leave it out"
    if model.lora is not None and config.train.mixed_precision == "fp8":
        yield (
            "model.lora with train.mixed_precision=fp8: both would take the place of the linear layers; set "
            "train.mixed_precision=bf16"
        )


def _about_data(config: Config) -> Iterator[str]:
    data = config.data
    if data.source is None and not data.mixture:
        yield "data.source is missing; set it to files or a Hub id, or data.mixture to several with weights"
    if data.source is not None and data.mixture:
        yield (
            f"data.source={data.source} and a data.mixture of {len(data.mixture)} sources are given; set one of them"
        )
    if data.mixture and (data.config_name, data.revision) != (None, None):
        yield (
            f"data.config_name={data.config_name} and data.revision={data.revision} are of a single source; with a mixture "
            "set them in its entries"
        )
    shortest, longest = data.min_document_tokens, data.max_document_tokens
    if shortest is not None and longest is not None and shortest > longest:
        yield (
            f"data.min_document_tokens={shortest} exceeds data.max_document_tokens={longest}: no document would be left; "
            "change one of them"
        )
    if data.tokenizer is not None and data.tokenizer_vocab_size is not None:
        yield (
            f"data.tokenizer={data.tokenizer} would be loaded and data.tokenizer_vocab_size="
            f"{data.tokenizer_vocab_size} trained; set one of them"
        )
    if data.tokenizer is None and data.tokenizer_vocab_size is None and config.model.name is None:
        yield ("no tokenizer: set data.tokenizer (a folder or Hub id) or data.tokenizer_vocab_size (to train one)")
    if (data.eval_split is None) == (data.eval_fraction is None):
        given = f"data.eval_split={data.eval_split} and data.eval_fraction={data.eval_fraction} are given"
        yield f"{given}; set one of them (eval_fraction=0.2 as the guide, 0 for no evaluation)"
    if data.eval_split is not None and data.eval_split == data.train_split:
        yield f"data.eval_split={data.eval_split} is also data.train_split; evaluate on other text"


def _about_training(config: Config) -> Iterator[str]:
    train, optim = config.train, config.optim
    if (train.epochs is None) == (train.max_steps is None):
        yield f"train.epochs={train.epochs} and train.max_steps={train.max_steps} are given; set one of them"
    if train.micro_batch_size is not None and train.global_batch_size % train.micro_batch_size:
        yield (
            f"train.global_batch_size={train.global_batch_size} is not divisible by train.micro_batch_size="
            f"{train.micro_batch_size}; set a micro_batch_size among {divisors(train.global_batch_size)}"
        )
    if train.compile == "on" and train.activation_checkpointing == "selective":
        yield (
            "train.compile=on with train.activation_checkpointing=selective: a compiled block is one operation, of which no "
            "part can be kept; set train.compile=off, or train.activation_checkpointing to true or false"
        )
    if train.profile_steps is not None:
        first, last = train.profile_steps
        if first > last or (train.max_steps is not None and first > train.max_steps):
            yield (
                f"train.profile_steps=[{first}, {last}] are no steps of this run; give the first and the last one, between "
                f"1 and {train.max_steps or 'its last'}"
            )
    if (optim.decay_steps is not None) != (optim.schedule == "wsd"):
        yield (
            f"optim.schedule={optim.schedule} with optim.decay_steps={optim.decay_steps}: decay_steps is for wsd, "
            "which needs it; change one of them"
        )
    if train.max_steps is not None and optim.warmup_steps + (optim.decay_steps or 0) > train.max_steps:
        shorter = "shorten them" if optim.decay_steps else f"set optim.warmup_steps to {train.max_steps} or less"
        yield f"{lengths(optim)} into train.max_steps={train.max_steps}; {shorter}, or train longer"


def lengths(optim: OptimConfig) -> str:
    """Which parts of the schedule are too long, and their verb."""
    warmup, decay = f"optim.warmup_steps={optim.warmup_steps}", f"optim.decay_steps={optim.decay_steps}"
    return f"{warmup} and {decay} do not fit" if optim.decay_steps else f"{warmup} does not fit"


def _about_the_hub(config: Config) -> Iterator[str]:
    hub = config.publish.hub
    if (hub.every_steps is not None) != (hub.when == "steps"):
        yield (
            f"publish.hub.when={hub.when} with publish.hub.every_steps={hub.every_steps}: every_steps is for when=steps, "
            "which needs it; change one of them"
        )
    if hub.repo is not None and hub.when == "best" and config.data.eval_fraction == 0:
        yield "publish.hub.when=best with data.eval_fraction=0: nothing is evaluated; set publish.hub.when=end"


def divisors(number: int) -> str:
    """The divisors of `number` as text, smallest first: '1, 2, 4'."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
