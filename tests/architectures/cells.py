"""What is looked at of a trained architecture, on one process, each by other means than training's own."""

import copy
import json
from pathlib import Path
from unittest.mock import patch

import torch
from lora_rows import verdict as verdict_of_adapters

from clm_dist.checkpoint import content
from clm_dist.checkpoint.folder import newest_whole
from clm_dist.data.prepared import open_blocks, open_prepared
from clm_dist.data.tokenize import load_tokenizer, token_ids
from clm_dist.errors import UserError
from clm_dist.model import chunks
from clm_dist.model.architectures import BY_TYPE
from clm_dist.model.build import build_model, load_model
from clm_dist.model.causality import check_causality
from clm_dist.model.checkpointing import checkpoint_activations
from clm_dist.model.configuration import model_configuration, row_of
from clm_dist.model.generate import by_passes, generate, generates
from clm_dist.model.isolation import check_isolation
from clm_dist.model.loss import next_token_nll
from clm_dist.model.objective import find_objective

BLOCK = 32
PROOF = 64  # tokens of the proof here: chunks of attention that 32 would hide; positions have room for it


def verdict(holds: bool, why: str) -> str:
    return "yes" if holds else f"no: {why}"


def same_weights(one: Path, other: Path) -> str:
    """Whether two exports are equal, every byte."""
    equal = all((other / path.name).read_bytes() == path.read_bytes() for path in one.glob("*.safetensors"))
    return verdict(equal and any(one.glob("*.safetensors")), "the weights differ")


def by_hand(model, blocks) -> float:
    """Nats a token, written out: for each token the probability that the one before it gives it. In fp64."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for i in range(len(blocks)):
            ids = torch.from_numpy(blocks[[i]][0].astype("int64"))  # (T,)
            probabilities = model(input_ids=ids[None]).logits[0].double().softmax(-1)  # (T, V)
            given = [probabilities[t, ids[t + 1]] for t in range(len(ids) - 1)]
            total -= torch.stack(given).log().sum().item()
            count += len(given)
    return total / count


def fresh(config):
    """The model that the run began with."""
    tokenizer = load_tokenizer(f"{config.data.prepared_dir}/tokenizer")
    built = model_configuration(config.model, token_ids(tokenizer))
    model = build_model(config.model, built, config.seed)
    model.config.use_cache = False
    return model


def of_the_run(config, before: float, after: float) -> dict[str, str]:
    """Loss, round trip, text: what the run wrote against the weights that it left."""
    run = Path(config.run_dir)
    blocks = open_blocks(config, open_prepared(config), "eval")
    start = fresh(config)
    loaded = load_model(str(run / "model"))
    loaded.config.use_cache = False
    ends = by_hand(start, blocks), by_hand(loaded, blocks)
    exact = all(abs(hand / own - 1) < 2e-5 for hand, own in zip(ends, (before, after), strict=True))
    content.load_weights(start, content.read(newest_whole(run / "checkpoints"), "model"))
    ids = torch.arange(3, 3 + BLOCK)[None]
    with torch.no_grad():
        one, other = (model.eval()(input_ids=ids).logits for model in (start, loaded))
    noise = row_of(start.config).noise * one.abs().max()  # of MEGA's Fourier transform; of the others none
    same = one.equal(other) or (one - other).abs().max() < noise
    return {
        "our loss": verdict(exact, f"by hand {ends[0]:.6g} and {ends[1]:.6g}, reported {before:.6g} and {after:.6g}"),
        "round trip": verdict(same, "logits of the export are not those of the checkpoint"),
        "generate": text(config, loaded),
    }


def text(config, loaded) -> str:
    """Whether the text is the same before and after the export, and what the model itself finds likeliest."""
    [row] = [json.loads(one) for one in Path(config.run_dir, "samples.jsonl").read_text().splitlines()][-1:]
    tokenizer = load_tokenizer(f"{config.run_dir}/model")
    again = generate(loaded, tokenizer, row["prompt"], config.generate, config.seed)
    if again != row["text"]:
        return f"no: {row['text']!r} before the export, {again!r} after it"
    if not generates(loaded):
        return "yes, by whole passes"
    ids = torch.tensor([tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]])
    plain = by_passes(loaded, ids, config.generate, tokenizer.eos_token_id)
    likeliest = tokenizer.decode(plain[0], skip_special_tokens=True)
    return verdict(likeliest == again, f"generate says {again!r}, the model itself {likeliest!r}")


def of_the_model(config, longer: bool) -> dict[str, str]:
    """What needs no processes."""
    found = {}
    for name, look in (LOOKS | (LONG_LOOKS if longer else {})).items():
        try:
            found[name] = look(config)
        except UserError as error:
            found[name] = f"no: {' '.join(str(error).split())}"
        except Exception as error:
            found[name] = f"no: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return found


def causal(config) -> str:
    """At more tokens than training had."""
    check_causality(fresh(config), PROOF, config.model.type, next_token_nll)
    return "yes"


def gradients(model, autocast: bool = False):
    """Loss and gradients of one batch."""
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (2, BLOCK))
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model.train()(input_ids=ids).logits
    loss = next_token_nll(logits, ids).mean()
    loss.backward()
    return loss.item(), {name: one.grad for name, one in model.named_parameters() if one.requires_grad}


def chunked(config) -> str:
    """Loss and gradients by several chunks of tokens are those of autograd through whole logits."""
    model = fresh(config)
    loss, wanted = gradients(model)
    model.zero_grad()
    objective = find_objective(model)
    if objective.head is None:
        return f"no: {objective.why}; all logits are made at once"
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (2, BLOCK))
    torch.manual_seed(1)
    with patch.object(chunks, "ELEMENTS_ON_CPU", 300 * 24):
        summed = objective.summed(model.train(), {"input_ids": ids}) / ids[:, 1:].numel()
        summed.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    pairs = [(found[name], one) for name, one in wanted.items() if one is not None]
    off, size = (sum(one.double().square().sum().item() for one in ones) ** 0.5
                 for ones in ([a - b for a, b in pairs], [b for _, b in pairs]))  # fmt: skip
    return verdict(
        abs(summed.item() / loss - 1) <= 1e-6 and off <= 1e-6 * size,
        f"gradients are {off / size:.1e} of their norm off",
    )


def activation_checkpointing(config) -> str:
    """The same gradients, computed again: all of a block, and of its operations some."""
    model = fresh(config)
    copies = {how: copy.deepcopy(model) for how in (True, "selective")}
    _, one = gradients(model)
    for how, again in copies.items():
        try:
            checkpoint_activations(again, how)
        except UserError:
            return "no: transformers has none for it, and train.activation_checkpointing=true is refused"
        _, other = gradients(again)
        same = all(torch.equal(one[name], other[name]) for name in one if one[name] is not None)
        if not same or one.keys() != other.keys():
            return verdict(False, f"the gradients differ, train.activation_checkpointing={str(how).lower()}")
    return verdict(True, "")


def bf16(config) -> str:
    """The same loss but for rounding, and gradients that are numbers."""
    exact, _ = gradients(without_dropout(fresh(config)))
    rounded, found = gradients(without_dropout(fresh(config)), autocast=True)
    finite = all(one is None or torch.isfinite(one).all() for one in found.values())
    return verdict(finite and abs(rounded / exact - 1) < 0.02, f"loss {rounded:.4f}, in fp32 {exact:.4f}")


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def isolation(config) -> str:
    """Where it is not kept, train.isolate_documents=true is refused."""
    try:
        check_isolation(fresh(config), BLOCK, config.model.type)
    except UserError:
        return "no: it does not go by position_ids, and train.isolate_documents=true is refused"
    return "yes"


def all_trained(config) -> str:
    """Every weight that is to be trained has a gradient: DDP waits for each."""
    _, found = gradients(fresh(config))
    without = [name for name, one in found.items() if one is None]
    return verdict(not without, f"{len(without)} have no gradient, {without[:1]}")


def compiled(config) -> str:
    """torch.compile: forward and backward as graphs (aot_eager, which shows what can be captured), the same loss."""
    model = without_dropout(fresh(config))
    exact, _ = gradients(copy.deepcopy(model))
    loss, _ = gradients(torch.compile(model, backend="aot_eager"))
    return verdict(abs(loss / exact - 1) < 1e-5, f"loss {loss:.6f}, eager {exact:.6f}")


def adapters(config) -> str:
    return verdict_of_adapters(BY_TYPE[config.model.type])


# what is looked at every time, and what takes longer
LOOKS = {
    "lora": adapters,
    "causal": causal,
    "gradients": all_trained,
    "chunked loss": chunked,
    "checkpointing": activation_checkpointing,
    "bf16": bf16,
    "isolation": isolation,
}
LONG_LOOKS = {"compile": compiled}
