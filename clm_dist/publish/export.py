"""A plain Hugging Face folder: safetensors, tokenizer, generation config, model card."""

import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from clm_dist.config import GenerateConfig


def export(
    accelerator: Accelerator, model: Any, tokenizer: Any, folder: Path, card: str, sampling: GenerateConfig
) -> None:
    """Writes `folder` for `from_pretrained` and `pipeline`. Every rank must call this; the main process writes.

    Written beside its place first; a folder of that name stays until the new one is whole.
    """
    weights = accelerator.get_state_dict(model)  # collective where weights are sharded
    if not accelerator.is_main_process:
        return
    plain = accelerator.unwrap_model(model)  # keeps mixed precision: without it the training that follows would lose it
    staged = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    _set_generation_defaults(plain, tokenizer, sampling)
    trained_with_cache, plain.config.use_cache = plain.config.use_cache, True  # off in training only
    plain.save_pretrained(staged, state_dict=weights, is_main_process=True)
    plain.config.use_cache = trained_with_cache
    tokenizer.save_pretrained(staged)
    (staged / "README.md").write_text(card, encoding="utf-8")
    for path in staged.glob("*.safetensors"):  # which safetensors makes readable to its owner alone
        path.chmod((staged / "README.md").stat().st_mode & 0o777)
    former = folder.with_name(f".{folder.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    staged.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def _set_generation_defaults(model: Any, tokenizer: Any, sampling: GenerateConfig) -> None:
    """The recipe's sampling becomes what `pipeline(...)` does when asked for nothing else."""
    generation = model.generation_config
    generation.do_sample = sampling.do_sample
    generation.max_new_tokens = sampling.max_new_tokens
    # None where nothing is drawn: what the base model came with would be refused when it is saved
    for name in ("temperature", "top_k", "top_p"):
        setattr(generation, name, getattr(sampling, name) if sampling.do_sample else None)
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
