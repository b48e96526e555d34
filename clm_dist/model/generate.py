"""Text from a model: one prompt at a time, so that a prompt's continuation does not depend on its neighbours."""

from typing import Any

import torch
from pydantic import ValidationError

from clm_dist.config import GenerateConfig
from clm_dist.errors import UserError
from clm_dist.model.configuration import row_of
from clm_dist.model.padding import check_prompt
from clm_dist.model.positions import max_positions


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    settings: GenerateConfig,
    seed: int,
    streamer: Any = None,
    together: bool = False,
) -> str:
    """The prompt and its continuation. The same (model, prompt, settings, seed) gives the same text.

    together: whether each rank gathers its weights from all, so that all have to call this and run equally many passes.
    The global random state is left as it was, so that sampling during training does not change what is learned.
    """
    ids = prompt_ids(tokenizer, prompt, settings, max_positions(model.config))
    check_prompt(model.config, ids, tokenizer)
    input_ids = torch.tensor([ids], device=model.device)  # (1, T)
    sampling = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if generates(model):
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=settings.max_new_tokens,
                do_sample=settings.do_sample,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                use_cache=True,
                streamer=streamer,
                synced_gpus=together,
                **(sampling if settings.do_sample else {}),
            )
        else:
            output = by_passes(model, input_ids, settings, tokenizer.eos_token_id, streamer, together)
    model.train(was_training)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def generates(model: Any) -> bool:
    """Whether transformers' own `generate` says what the model predicts; some count positions otherwise than training."""
    row = row_of(model.config)
    return bool(model.can_generate()) and (row is None or row.generates)


@torch.no_grad()
def by_passes(
    model: Any,
    input_ids: torch.Tensor,
    settings: GenerateConfig,
    eos_token_id: int | None,
    streamer: Any = None,
    together: bool = False,
) -> torch.Tensor:
    """Continues (1, T) ids with a pass over all of them for each token: right for any model that trains here, and slow.

    top_k and top_p as in transformers (Holtzman et al., arXiv:1904.09751).
    """
    ids, ended = input_ids, False
    if streamer is not None:
        streamer.put(ids.cpu())
    for _ in range(settings.max_new_tokens):
        logits = model(input_ids=ids).logits[:, -1].float()  # (1, V)
        if ended:
            continue  # together: the others may not have ended
        if settings.do_sample:
            token = torch.multinomial(_likely(logits / settings.temperature, settings).softmax(-1), 1)
        else:
            token = logits.argmax(-1, keepdim=True)
        ids = torch.cat((ids, token), dim=1)
        if streamer is not None:
            streamer.put(token[0].cpu())
        ended = eos_token_id is not None and token.item() == eos_token_id
        if ended and not together:
            break
    if streamer is not None:
        streamer.end()
    return ids


def _likely(logits: torch.Tensor, settings: GenerateConfig) -> torch.Tensor:
    """Logits (1, V) with -inf for what is not to be drawn."""
    if settings.top_k:
        least = logits.topk(min(settings.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -float("inf"))
    if settings.top_p is not None and settings.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # of those that are likelier
        logits = logits.masked_fill((before >= settings.top_p).gather(-1, order.argsort(-1)), -float("inf"))
    return logits


def prompt_ids(tokenizer: Any, prompt: str, settings: GenerateConfig, positions: int | None) -> list[int]:
    """The ids to continue: the prompt's, without special tokens, as in training; UserError where they do not fit."""
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not ids:
        if tokenizer.eos_token_id is None:
            raise UserError("the prompt is empty and the tokenizer has no end-of-text to start from; give a prompt")
        ids = [tokenizer.eos_token_id]  # what stands before a document's first token in training
    if positions is not None and len(ids) + settings.max_new_tokens > positions:
        raise UserError(
            f"a prompt of {len(ids)} tokens and generate.max_new_tokens={settings.max_new_tokens} exceed the model's "
            f"{positions} positions; shorten the prompt or set generate.max_new_tokens={max(1, positions - len(ids))}"
        )
    return ids


def saved_settings(model: Any, overrides: dict[str, Any]) -> GenerateConfig:
    """The sampling that the model was exported with (generation_config.json), with `overrides` laid over it."""
    saved = {
        name: getattr(model.generation_config, name, None) for name in GenerateConfig.model_fields if name != "prompts"
    }
    given = {name: value for name, value in saved.items() if value is not None} | overrides
    if not given.get("do_sample", True):  # what is not used may be anything: temperature 0 is often written for greedy
        used = {"do_sample", "max_new_tokens", *overrides}
        given = {name: value for name, value in given.items() if name in used}
    try:
        return GenerateConfig(**given)
    except ValidationError as error:
        wrong = ", ".join(f"{details['loc'][0]}={details['input']}" for details in error.errors())
        raise UserError(
            f"the model's generation_config.json asks for {wrong}; set generate.* on the command line"
        ) from None
