"""What a checkpoint holds of a live run: weights and optimizer by parameter name, generators of random numbers as text."""

import base64
import json
import random
from typing import Any

import numpy as np
import torch

from clm_dist.checkpoint.folder import Checkpoint
from clm_dist.checkpoint.saved import Saved
from clm_dist.errors import RunError

Tensors = dict[str, torch.Tensor]


def weights(model: torch.nn.Module, given: frozenset[str] = frozenset()) -> Tensors:
    """Parameters and saved buffers, each once: tied ones by their first name.

    given: names to leave out, of weights that every start has again without a checkpoint.
    """
    saved = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    everything = {**dict(model.named_parameters()), **buffers}
    return {name: tensor for name, tensor in everything.items() if name not in given}


def optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Everything the optimizer remembers, as `exp_avg.transformer.wte.weight`."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}.{names[parameter]}": value if torch.is_tensor(value) else torch.tensor(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def share(everything: Tensors, rank: int, world_size: int) -> Tensors:
    """The part that one rank writes: all hold the same, so each writes about as many bytes as any other."""
    loads = [0] * world_size
    mine = {}
    for name in sorted(everything, key=lambda name: (-everything[name].nbytes, name)):
        least = loads.index(min(loads))
        loads[least] += everything[name].nbytes
        if least == rank:
            mine[name] = everything[name]
    return mine


def parts(held: Tensors, most: int) -> list[tuple[str, Tensors]]:
    """A share in files of about `most` bytes, each with the ending of its name: several can be written at once."""
    count = max(1, min(len(held), round(sum(tensor.nbytes for tensor in held.values()) / most)))
    if count == 1:
        return [("", held)]
    return [(f".{part + 1}", share(held, part, count)) for part in range(count)]


def load_weights(model: torch.nn.Module, found: Saved, given: frozenset[str] = frozenset()) -> None:
    """Puts saved weights into a model of the same architecture. given: those that it has already."""
    live = weights(model, given)
    check_names("weights", set(live), found.names())
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(found.whole(name, tensor.shape))


def load_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, found: Saved) -> None:
    """Gives the optimizer back what it remembered; nothing of what it was told (learning rates, decays)."""
    parameters = dict(model.named_parameters())
    by_name: dict[str, Tensors] = {}
    for full_name in sorted(found.names()):
        key, _, name = full_name.partition(".")
        if name not in parameters:
            raise RunError(f"the checkpoint's optimizer remembers {name}, which the model has not")
        shape = parameters[name].shape if found.numel(full_name) == parameters[name].numel() and key != "step" else ()
        by_name.setdefault(name, {})[key] = found.whole(full_name, torch.Size(shape))
    names = {parameter: name for name, parameter in parameters.items()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {i: by_name[names[parameter]] for i, parameter in enumerate(order) if names[parameter] in by_name}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read(checkpoint: Checkpoint, kind: str) -> Saved:
    """All shares of `model` or `optimizer`, whoever wrote them."""
    names = [name for name in checkpoint.files() if name.startswith(f"{kind}-") and name.endswith(".safetensors")]
    return Saved([checkpoint.path / name for name in names])


def generators(device: torch.device) -> dict[str, Any]:
    """The states of all generators of random numbers of this process, for JSON."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {"torch": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        **{key: base64.b64encode(state.numpy().tobytes()).decode() for key, state in states.items()},
    }


def load_generators(checkpoint: Checkpoint, rank: int, device: torch.device) -> None:
    """Goes on with the random numbers of this rank."""
    set_generators(json.loads((checkpoint.path / f"rank-{rank:05d}.json").read_text(encoding="utf-8")), device)


def seed_generators(seed: int) -> None:
    """Begins all generators of random numbers of this process anew."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_generators(saved: dict[str, Any], device: torch.device) -> None:
    """Goes on with random numbers where `generators` was called."""
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(saved["torch"]))
    if "device" in saved and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(_bytes(saved["device"]), device)


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def check_names(what: str, live: set[str], found: set[str]) -> None:
    """RunError, naming one, where the model has other tensors than the checkpoint."""
    if live != found:
        different = sorted(live ^ found)
        raise RunError(f"{what} differ from the checkpoint's: {different[0]} (and {len(different) - 1} more)")
