"""What a checkpoint holds comes back bit for bit, each byte of it once; and whoever made it, it runs no code."""

import contextlib
import hashlib
import json
import pickle
import random
import re

import handmade
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_MODEL
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from clm_dist.checkpoint import content, folder, tensors
from clm_dist.checkpoint.folder import Checkpoint
from clm_dist.checkpoint.sameness import saved_configuration
from clm_dist.checkpoint.saved import Saved
from clm_dist.errors import RunError

CPU = torch.device("cpu")


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


TENSORS = {
    "scalar": torch.tensor(0.1),
    "empty": torch.empty(0),
    "empty rows": torch.empty(0, 3),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "strided": torch.arange(12)[::5],
    "expanded": torch.ones(1).expand(5),
    "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
    "a parameter": torch.nn.Parameter(torch.ones(2, 2)),
    "bool": torch.tensor([True, False, True]),  # three bytes: what follows is not aligned
}


@pytest.mark.parametrize("dtype", tensors.NAMES)
def test_every_type_is_read_by_the_library(tmp_path, dtype):
    values = {"odd": torch.tensor([True]), "some": torch.tensor([[0, 1], [1, 1], [3, 7]]).to(dtype)}
    tensors.save(tmp_path / "a.safetensors", values)
    assert_same(load_file(tmp_path / "a.safetensors"), values)


def test_every_shape_is_read_by_the_library_and_the_hash_is_that_of_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    written = tensors.save(path, TENSORS)
    assert_same(load_file(path), TENSORS)
    data = path.read_bytes()
    assert written == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    header = int.from_bytes(data[:8], "little")
    assert header % 8 == 0
    assert json.loads(data[8 : 8 + header])["scalar"] == {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}


def test_no_tensors_are_a_file_too(tmp_path):
    tensors.save(tmp_path / "a.safetensors", {})
    assert load_file(tmp_path / "a.safetensors") == {}


def test_a_file_is_never_written_over(tmp_path):
    tensors.save(tmp_path / "a", {})
    with pytest.raises(FileExistsError):
        tensors.save(tmp_path / "a", {})


SIZES = {"a": 8, "b": 8, "c": 4, "d": 2, "e": 2, "f": 0}  # numbers of four bytes
SHARES = {1: ["abcdef"], 2: ["acf", "bde"], 3: ["af", "b", "cde"], 8: ["a", "b", "c", "d", "e", "f", "", ""]}


@pytest.mark.parametrize("world_size", SHARES)
def test_shares_cover_everything_once_in_about_equal_bytes(world_size):
    everything = {name: torch.zeros(size) for name, size in SIZES.items()}
    shares = [content.share(everything, rank, world_size) for rank in range(world_size)]
    assert sorted(name for one in shares for name in one) == list("abcdef")
    assert all(one[name] is everything[name] for one in shares for name in one)
    loads = sorted(sum(tensor.nbytes for tensor in one.values()) for one in shares)
    assert loads == sorted(4 * sum(SIZES[name] for name in part) for part in SHARES[world_size])


def test_shares_of_a_real_model_differ_by_one_tensor_at_most():
    everything = content.weights(tiny())
    loads = [sum(tensor.nbytes for tensor in content.share(everything, rank, 3).values()) for rank in range(3)]
    assert sum(loads) == sum(tensor.nbytes for tensor in everything.values())
    assert max(loads) - min(loads) <= max(tensor.nbytes for tensor in everything.values())


def tiny(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**TINY_MODEL["config"], vocab_size=50))


def adamw(model):
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    plain = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0}], lr=1e-2)


def learn(model, optimizer, step):
    ids = torch.arange(16).reshape(2, 8) * (step + 3) % 50
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def write(place, model, optimizer, world_size):
    """A checkpoint as so many ranks write it."""
    folder.stage(place, 2)
    staged, files = folder.staged_path(place, 2), {}
    everything = {"model": content.weights(model), "optimizer": content.optimizer_state(model, optimizer)}
    for rank in range(world_size):
        for kind, held in everything.items():
            name = f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors"
            files[name] = tensors.save(staged / name, content.share(held, rank, world_size))
    return folder.commit(place, 2, files, {**handmade.STATE, "step": 2}, "{}\n")


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_model_and_its_optimizer_go_on_to_the_bit(tmp_path, world_size):
    model = tiny()
    optimizer = adamw(model)
    for step in range(2):
        learn(model, optimizer, step)
    saved = write(tmp_path, model, optimizer, world_size)
    assert saved.problem() is None
    found = content.read(saved, "model")
    assert "transformer.wte.weight" in found.names() and "lm_head.weight" not in found.names()  # tied: once
    other = tiny(seed=1)
    continued = adamw(other)
    content.load_weights(other, found)
    content.load_optimizer(other, continued, content.read(saved, "optimizer"))
    assert other.lm_head.weight is other.transformer.wte.weight
    assert_same(content.weights(other), content.weights(model))
    assert_same(content.optimizer_state(other, continued), content.optimizer_state(model, optimizer))
    for one in ((model, optimizer), (other, continued)):
        learn(*one, 2)
    assert_same(content.weights(other), content.weights(model))


def test_the_optimizer_keeps_what_it_is_told(tmp_path):
    model = tiny()
    optimizer = adamw(model)
    learn(model, optimizer, 0)
    saved = write(tmp_path, model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.5
    content.load_optimizer(model, optimizer, content.read(saved, "optimizer"))
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.1), (1e-2, 0)]


def test_mutant_without_optimizer_state_goes_another_way(tmp_path):
    model = tiny()
    optimizer = adamw(model)
    learn(model, optimizer, 0)
    saved = write(tmp_path, model, optimizer, 1)
    other = tiny(seed=1)
    content.load_weights(other, content.read(saved, "model"))
    for one in ((model, optimizer), (other, adamw(other))):
        learn(*one, 1)
    assert bits(other.lm_head.weight) != bits(model.lm_head.weight)


@pytest.mark.parametrize("change", ["missing", "more", "shape", "turned"])
def test_weights_of_another_model_are_refused(tmp_path, change):
    model = tiny()
    found = {name: tensor.detach().clone() for name, tensor in content.weights(model).items()}
    name = "transformer.ln_f.bias"
    if change == "missing":
        del found[name]
    elif change == "more":
        found["other"] = torch.ones(1)
    elif change == "turned":  # as many elements
        name = "transformer.wte.weight"
        found[name] = found[name].T.contiguous()
    else:
        found[name] = torch.ones(3)
    with pytest.raises(RunError, match="other" if change == "more" else name):
        content.load_weights(model, written(tmp_path, found))


def written(tmp_path, held):
    """Tensors of a file of a checkpoint."""
    tensors.save(tmp_path / "a.safetensors", held)
    return Saved([tmp_path / "a.safetensors"])


def test_optimizer_state_of_another_model_is_refused(tmp_path):
    model = tiny()
    with pytest.raises(RunError, match="nobody"):
        content.load_optimizer(model, adamw(model), written(tmp_path, {"exp_avg.nobody.weight": torch.ones(1)}))


def test_pieces_are_one_tensor(tmp_path):
    """Three ranks' parts of (4, 3) and one whole (2, 3), read across their seams."""
    whole, flat = torch.arange(6.0).view(2, 3), torch.arange(12.0)
    tensors.save(tmp_path / "1", {"w@0": flat[:5], "v": whole})
    tensors.save(tmp_path / "2", {"w@9": flat[9:]})
    tensors.save(tmp_path / "3", {"w@5": flat[5:9]})
    saved = Saved([tmp_path / name for name in "123"])
    assert saved.names() == {"v", "w"} and saved.numel("w") == 12
    assert saved.read("w", 4, 10).tolist() == [4, 5, 6, 7, 8, 9]
    assert saved.whole("w", torch.Size([4, 3])).tolist() == flat.view(4, 3).tolist()
    assert saved.read("v", 1, 5).tolist() == [1, 2, 3, 4]  # of rows 0 and 1
    with pytest.raises(RunError, match="w was saved with 12 elements, the model has"):
        saved.whole("w", torch.Size([4, 4]))
    with pytest.raises(RunError, match="w: the checkpoint holds no elements 9 to 12"):
        Saved([tmp_path / "1", tmp_path / "3"]).read("w", 8, 12)


def draw():
    gauss = random.gauss(0, 1), float(np.random.normal())  # both keep a second one back
    return [random.random(), *gauss, float(np.random.rand()), *torch.rand(3).tolist()]


def test_generators_go_on():
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    draw()
    saved = json.loads(json.dumps(content.generators(CPU)))
    expected = draw() + draw()
    content.set_generators(saved, CPU)
    assert draw() + draw() == expected


class Bomb:
    """Runs code of somebody else when it is unpickled."""

    def __init__(self, touched):
        self.touched = str(touched)

    def __reduce__(self):
        return open, (self.touched, "w")


def payload(kind, touched, path):
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(touched)))
    elif kind == "numpy":
        with path.open("wb") as file:
            np.save(file, np.array([Bomb(touched)], dtype=object), allow_pickle=True)
    elif kind == "yaml":
        path.write_text(f"!!python/object/apply:builtins.open ['{touched}', 'w']\n")
    else:
        torch.save(Bomb(touched), path, _use_new_zipfile_serialization=kind == "zip")


def use(path):
    """All that a start does with a checkpoint, each as if the one before had been fine."""
    one = Checkpoint(path)
    readings = [one.problem, one.state, one.files, lambda: saved_configuration(one)]
    readings += [lambda kind=kind: content.read(one, kind) for kind in ("model", "optimizer")]
    for read in [*readings, lambda: content.load_generators(one, 0, CPU)]:
        with contextlib.suppress(Exception):  # an error is all it may be
            read()


@pytest.mark.parametrize("sealed", [False, True], ids=["hashes differ", "hashes agree"])
@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy", "numpy", "yaml"])
@pytest.mark.parametrize("name", handmade.FILES)
def test_a_checkpoint_of_somebody_else_runs_no_code(tmp_path, name, kind, sealed):
    handmade.save(tmp_path, 10)
    path, touched = tmp_path / "step-00000010", tmp_path / "touched"
    payload(kind, touched, path / name)
    if sealed and name == folder.MANIFEST:
        handmade.mark(path, (path / name).read_bytes())
    elif sealed and name != folder.MARK:
        handmade.seal(path)
    generators = torch.get_rng_state()
    use(path)
    torch.set_rng_state(generators)
    assert not touched.exists()


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy", "numpy"])
def test_the_payloads_would_go_off(tmp_path, kind):
    payload(kind, tmp_path / "touched", tmp_path / "bomb")
    if kind == "pickle":
        pickle.loads((tmp_path / "bomb").read_bytes())
    elif kind == "numpy":
        np.load(tmp_path / "bomb", allow_pickle=True)
    else:
        torch.load(tmp_path / "bomb", weights_only=False)
    assert (tmp_path / "touched").exists()


def test_nothing_in_the_package_unpickles():
    forbidden = r"\bimport (pickle|dill|marshal|shelve|joblib)|pickle\.load|torch\.load\(|weights_only|\.load_state\("
    forbidden += r"|allow_pickle=True|yaml\.(load|unsafe_load|full_load)\(|\beval\(|\bexec\("
    for path in sorted((ROOT / "clm_dist").rglob("*.py")):
        text = re.sub(r"\.eval\(\)", "", path.read_text())  # model.eval()
        assert not re.search(forbidden, text), f"{path.name}: {re.search(forbidden, text)[0]}"
