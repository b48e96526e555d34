"""What a model is made of, from its configuration alone: built on the meta device, which holds shapes and no numbers."""

from dataclasses import dataclass
from typing import Any

from clm_dist.config import ModelConfig


@dataclass(frozen=True)
class Shapes:
    """Sizes of the tensors of a model. A tensor that two modules share (a tied head) stands here once."""

    matrices: tuple[
        int, ...
    ]  # elements of each trained tensor of two or more dimensions, in the model's order: decayed
    vectors: tuple[int, ...]  # of the other trained ones: biases and norms, without decay
    frozen: tuple[int, ...]  # of parameters that are not trained
    buffer_bytes: int  # of what a model keeps beside parameters, e.g. frequencies of rotary positions
    lookup: int  # parameters of the input embedding where it is not the head too: read by index, never multiplied
    layers: int
    width: int  # of attention: heads x size of a head
    rows: tuple[int, ...] = ()  # first dimension of each tensor: matrices, vectors, frozen ones
    largest_block: int = 0  # parameters of the largest layer, which FSDP2 gathers as one
    outside: int = 0  # of what is in no layer: embeddings, the head
    lookup_frozen: bool = False

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The parameter groups of `make_optimizer`; empty ones do not count."""
        return tuple(group for group in (self.matrices, self.vectors) if group)

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return sum(self.matrices) + sum(self.vectors)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.trained + sum(self.frozen)


def shapes(config: ModelConfig, built: Any) -> Shapes:
    """The shapes of a model by its configuration; no weight is made or loaded."""
    import torch

    from clm_dist.model.build import outline

    with torch.device("meta"):
        model = outline(config, built, torch.float32)
    return shapes_of(model)


def shapes_of(model: Any) -> Shapes:
    """The shapes of a model that exists."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embedding = getattr(model.get_input_embeddings(), "weight", None)  # Transformer-XL's is in pieces
    head = getattr(model.get_output_embeddings(), "weight", None)  # MusicGen has one for each codebook
    tied = head is not None and head is embedding
    text = model.config.get_text_config()
    heads, width = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", 0)
    size_of_head = getattr(text, "head_dim", None)
    if isinstance(heads, int) and isinstance(size_of_head, int):
        width = heads * size_of_head
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    blocks = _blocks(model)
    return Shapes(
        matrices=tuple(parameter.numel() for parameter in matrices),
        vectors=tuple(parameter.numel() for parameter in vectors),
        frozen=tuple(parameter.numel() for parameter in frozen),
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        lookup=0 if tied or embedding is None else embedding.numel(),
        layers=getattr(text, "num_hidden_layers", 0) or 0,
        width=width or 0,
        rows=tuple(parameter.shape[0] if parameter.ndim else 1 for parameter in (*matrices, *vectors, *frozen)),
        largest_block=max(blocks, default=0),
        outside=sum(parameter.numel() for parameter in model.parameters()) - sum(blocks),
        lookup_frozen=embedding is not None and not embedding.requires_grad,
    )


def hidden_size(model_configuration: Any) -> int | None:
    """The width of a model, by its configuration; None where it tells none or several."""
    size = getattr(model_configuration.get_text_config(), "hidden_size", None)
    return size if isinstance(size, int) else None


def _blocks(model: Any) -> list[int]:
    """Parameters of each layer, by the names that a transformers model has for them."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    return [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
