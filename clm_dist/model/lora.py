"""Adapters of low rank beside frozen weights (LoRA: Hu et al., arXiv:2106.09685), by peft, inside the transformers model.

The model stays what it was: its class, `generate`, `config`, and the names of its blocks. A linear layer `x` becomes one
that holds the frozen `x.base_layer` and the trained `x.lora_A.default` (rank, in) and `x.lora_B.default` (out, rank).
"""

import hashlib
import re
import tempfile
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from clm_dist.config import LoraConfig
from clm_dist.errors import UserError, nearest
from clm_dist.model.configuration import row_of
from clm_dist.versions import check_peft

ADAPTER = "default"  # peft's name for the only one
ALL = "all-linear"
BASE, A, B = ".base_layer.", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"
FOLDER = "adapter"  # in an exported model

Weights = dict[str, torch.Tensor]


def adapt(model: Any, config: LoraConfig, seed: int | None) -> None:
    """Puts adapters beside linear layers and freezes everything else, in place. Drawn from `seed`, the same on every rank;
    they begin with a B of zeros, so that the model computes what it did before.

    seed None: of a model without contents (the meta device, FakeTensorMode); adapters have no contents either.
    """
    check_peft()
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    names = targets(model, config)
    modules = dict(model.named_modules())
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=_shortened(names, modules),
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in names),  # of GPT-2: its weight is (in, out)
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where a model has both kinds of layers, peft sets fan_in_fan_out by itself
        torch.manual_seed(seed or 0)
        # peft moves adapters to where the model is, which tensors without contents refuse
        with patch.object(torch.nn.Module, "to", lambda module, *_, **__: module) if seed is None else nullcontext():
            inject_adapter_in_model(settings, model)
    if seed is None:
        _place(model)
    if set(adapters(model)) != set(names):
        odd = sorted(set(adapters(model)) ^ set(names))
        raise UserError(
            f"model.lora: peft takes layers of {type(model).__name__} for others (experts that are one tensor now): "
            f"{', '.join(kinds(odd))}; set model.lora.target_modules to some without these, e.g. of attention"
        )
    if (row := row_of(model.config)) is not None and row.reversible:
        model.enable_input_require_grads()


def _place(model: Any) -> None:
    """Adapters where, and in the type in which, the layers are."""
    for layer in adapters(model).values():
        like = layer.get_base_layer().weight
        for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            part.weight = torch.nn.Parameter(torch.empty(part.weight.shape, dtype=like.dtype, device=like.device))


def adapters(model: Any) -> dict[str, Any]:
    """The layers that have an adapter, by name; none in a model that is trained whole."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def given(model: Any) -> frozenset[str]:
    """Names of the weights that every start has again without a checkpoint: the frozen base of a model with adapters."""
    if not adapters(model):
        return frozenset()
    return frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def base_sha256(model: Any) -> str:
    """The hash of all that is `given`: name, type, shape and bytes. Before an engine takes the model."""
    parameters, names = dict(model.named_parameters()), sorted(given(model))

    def line(name: str) -> str:
        one = parameters[name].detach().cpu().contiguous()
        digest = hashlib.sha256(one.view(-1).view(torch.uint8).numpy())
        return f"{name.replace(BASE, '.')} {one.dtype} {tuple(one.shape)} {digest.hexdigest()}\n"

    with ThreadPoolExecutor(4) as pool:  # hashing lets other threads run
        return hashlib.sha256("".join(pool.map(line, names)).encode()).hexdigest()


def check_reached(model: Any, block_size: int) -> None:
    """UserError where a layer's weight is read past the layer: its adapter would have no gradient, and no effect.

    One pass over tokens of one block. Experts are passed over: whether one has work goes by the tokens.
    """
    reached: set[str] = set()
    layers = {name: layer for name, layer in adapters(model).items() if ".experts." not in name}
    hooks = [
        layer.lora_A[ADAPTER].register_forward_hook(lambda *_, name=name: reached.add(name))
        for name, layer in layers.items()
    ]
    device, vocabulary = next(model.parameters()).device, int(model.config.get_text_config().vocab_size)
    ids = torch.arange(min(block_size, 64), device=device)[None] * 7 % vocabulary  # (1, T)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model(input_ids=ids)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if missed := kinds(set(layers) - reached):
        others = [kind for kind in kinds(reached) if kind not in missed]
        raise UserError(
            f"model.lora: {type(model).__name__} reads the weights of {', '.join(missed)} past the layer, so that an "
            f"adapter there would do nothing; set model.lora.target_modules=[{','.join(others)}]"
        )


def targets(model: Any, config: LoraConfig) -> list[str]:
    """Names of the layers that get an adapter. UserError, listing what there is, where a name of the recipe is none."""
    linear, usual = _linear_layers(model), _usual_layers(model)
    wanted = config.target_modules
    if wanted is None:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        found = [name for name in usual if _matches(name, KNOWN.get(model.config.model_type, ()))]
        return found or _some(model, usual)
    if wanted == (ALL,):
        return _some(model, usual)
    known = kinds(linear)
    for one in wanted:
        if not any(_matches(name, (one,)) for name in linear):
            endings = dict.fromkeys(name.rpartition(".")[2] for name in known)
            close = nearest(one, endings)
            raise UserError(
                f"model.lora.target_modules: {one} is no linear layer of {type(model).__name__}, which has "
                f"{', '.join(known)}{close if close.startswith('; did') else ''}; name endings of these "
                f"({', '.join(endings)}), {ALL}, or leave it out"
            )
    found, shared = [name for name in linear if _matches(name, wanted)], _shared(model)
    for name in found:
        if name in shared:
            raise UserError(
                f"model.lora.target_modules: {name} shares its weights with another layer or the embedding, which an "
                "adapter there would not change; leave it out"
            )
    return found


def merged(model: Any, weights: Weights) -> Weights:
    """The plain model's weights by its own names: W + scaling B A where there is an adapter. The live ones are not touched:
    what has no adapter is handed on, what has one is new."""
    layers, plain = adapters(model), {}
    for name, tensor in weights.items():
        if name.endswith((A, B)):
            continue
        module, base, rest = name.rpartition(BASE)
        if base and rest == "weight" and module in layers:
            update = _update(layers[module], weights[module + A], weights[module + B])
            tensor = (tensor.to(update) + update).to(tensor.dtype)
        plain[name.replace(BASE, ".")] = tensor
    return plain


def adapter_files(model: Any, weights: Weights, base: str | None, commit: str | None) -> dict[str, bytes]:
    """The adapter as peft reads it, by name of file. base: what the recipe calls the model it belongs to."""
    from safetensors.torch import save

    settings = copy(model.peft_config[ADAPTER])
    settings.base_model_name_or_path, settings.revision, settings.inference_mode = base, commit, True
    with tempfile.TemporaryDirectory() as folder:
        settings.save_pretrained(folder)
        written = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    held = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.detach().cpu().contiguous()
        for name, tensor in weights.items()
        if name.endswith((A, B))
    }
    written["adapter_model.safetensors"] = save(held, metadata={"format": "pt"})
    return {f"{FOLDER}/{name}": content for name, content in sorted(written.items())}


def kinds(names: Iterable[str]) -> list[str]:
    """Names of layers without the numbers of blocks: transformer.h.*.attn.c_attn, each once, in their order."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))


def _update(layer: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What an adapter adds to a weight, in fp32 or better. a: (rank, in), b: (out, rank)."""
    wide = torch.promote_types(a.dtype, torch.float32)
    product = layer.scaling[ADAPTER] * (b.to(wide) @ a.to(wide))
    return product.T if layer.fan_in_fan_out else product


def _linear_layers(model: Any) -> list[str]:
    """All whose weights text reaches."""
    from transformers.pytorch_utils import Conv1D

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module.weight.requires_grad
    ]


def _usual_layers(model: Any) -> list[str]:
    """All but the head, and what the table of architectures leaves out."""
    head, row, modules = model.get_output_embeddings(), row_of(model.config), dict(model.named_modules())
    left_out = _shared(model) | {name for name, module in modules.items() if module is head}
    parts = row.no_adapter if row else ()
    return [name for name in _linear_layers(model) if name not in left_out and not any(part in name for part in parts)]


def _shared(model: Any) -> set[str]:
    """Names of the modules whose weight another module holds, too."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), torch.nn.Parameter):
            holders.setdefault(id(weight), []).append(name)
    return {name for names in holders.values() if len(names) > 1 for name in names}


def _some(model: Any, found: list[str]) -> list[str]:
    if not found:
        raise UserError(f"model.lora: {type(model).__name__} has no linear layers but its head; leave model.lora out")
    return found


def _matches(name: str, wanted: str | Iterable[str]) -> bool:
    """As peft reads target_modules: a regular expression, or endings of names; `*` is the number of a block."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    dotted = f".{kinds([name])[0]}", f".{name}"
    return any(each.endswith(f".{one}") for one in wanted for each in dotted)


def _shortened(names: list[str], modules: dict[str, Any]) -> list[str]:
    """The last parts of these names where they mean the same layers: what others expect in adapter_config.json."""
    last = sorted({name.rpartition(".")[2] for name in names})
    return last if [name for name in modules if name and _matches(name, last)] == names else names


def told(config: LoraConfig, model: Any) -> str:
    """In words, for the screen and the card."""
    where = ", ".join(sorted({name.rpartition(".")[2] for name in adapters(model)}))
    return f"LoRA adapters of rank {config.rank} (alpha {config.alpha}) at {where}"
