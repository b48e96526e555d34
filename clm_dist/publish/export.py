"""A plain Hugging Face folder: safetensors, tokenizer, generation config, model card."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from clm_dist.config import GenerateConfig
from clm_dist.errors import RunError


def export(
    plain: Any,
    weights: Iterable[tuple[str, torch.Tensor | None]],
    tokenizer: Any,
    folder: Path,
    pages: Mapping[str, bytes],
    sampling: GenerateConfig,
    is_main_process: bool,
) -> None:
    """Writes `folder` for `from_pretrained` and `pipeline`. Every rank must call this; the main process writes.

    weights: all of them by name; taking them is collective where they are sharded. pages: other files by name, perhaps in
    folders of it, the card among them. Written beside its place first, and read back: a folder of that name stays until the
    new one is whole.
    """
    held = {name: tensor for name, tensor in weights if tensor is not None}
    if not is_main_process:
        return
    staged = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    _set_generation_defaults(plain, tokenizer, sampling)
    trained_with_cache, plain.config.use_cache = plain.config.use_cache, True  # off in training only
    plain.save_pretrained(staged, state_dict=dict(held), is_main_process=True)
    plain.config.use_cache = trained_with_cache
    if not check_written(staged, held):
        check_loaded(staged, type(plain), held)
    tokenizer.save_pretrained(staged)
    for name, content in pages.items():
        (staged / name).parent.mkdir(exist_ok=True)
        (staged / name).write_bytes(content)
    for path in staged.glob("*.safetensors"):  # which safetensors makes readable to its owner alone
        path.chmod((staged / "config.json").stat().st_mode & 0o777)
    former = folder.with_name(f".{folder.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    staged.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def check_written(folder: Path, live: dict[str, torch.Tensor]) -> bool:
    """RunError unless the files hold every live tensor, byte for byte: one of those that are tied is enough.

    Sharded weights that were never gathered come out as empty tensors, and load as such. False where transformers writes
    weights by other names, or in other pieces, than the model has (5 does so for GPT-NeoX and for experts).
    """
    missing = {tensor.data_ptr(): name for name, tensor in live.items() if tensor.numel()}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no dictionary
                written = file.get_tensor(name)
                if name not in live:
                    return False
                if written.shape != live[name].shape or not _same_bits(written, live[name]):
                    raise RunError(
                        f"{path}: {name} {tuple(written.shape)} {written.dtype} is not the live {tuple(live[name].shape)} "
                        f"{live[name].dtype}"
                    )
                missing.pop(live[name].data_ptr(), None)
    if missing:
        raise RunError(f"{folder} lacks {next(iter(missing.values()))} (and {len(missing) - 1} more)")
    return True


def check_loaded(folder: Path, model_class: Any, live: dict[str, torch.Tensor]) -> None:
    """The same by loading the files, as whoever uses them will: takes the memory of a second model."""
    dtype = next((tensor.dtype for tensor in live.values() if tensor.is_floating_point()), torch.float32)
    found = model_class.from_pretrained(folder, dtype=dtype, use_safetensors=True).state_dict()
    different = [name for name in live if name not in found or not _same_bits(found[name], live[name])]
    if different or found.keys() != live.keys():
        name = (different or sorted(found.keys() ^ live.keys()))[0]
        raise RunError(f"{folder} does not load as the live model: {name} is another")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equality of bytes: NaN equals itself."""
    if one.dtype != other.dtype:
        return False
    bits = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*bits)


def _set_generation_defaults(model: Any, tokenizer: Any, sampling: GenerateConfig) -> None:
    """The recipe's sampling becomes what `pipeline(...)` does when asked for nothing else."""
    generation = model.generation_config
    if generation is None:  # transformers 4.57 gives none to those that have left
        return
    generation.do_sample = sampling.do_sample
    generation.max_new_tokens = sampling.max_new_tokens
    # None where nothing is drawn: what the base model came with would be refused when it is saved
    for name in ("temperature", "top_k", "top_p"):
        setattr(generation, name, getattr(sampling, name) if sampling.do_sample else None)
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
