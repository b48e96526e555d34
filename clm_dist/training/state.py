"""All that a run is at a moment, beside weights and optimizer: numbers, and nothing that depends on who computes them."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Advanced by the loop, saved with every checkpoint, the same on every rank."""

    step: int = 0  # optimizer updates done: the position in the schedule, and of dropout
    cursor: int = 0  # blocks taken from the endless stream of the data; ahead of the steps after a rewind
    evaluated: int = -1  # step of the newest evaluation
    evaluation: dict[str, float] = field(default_factory=dict)  # its figures
    best_loss: float | None = None  # the lowest evaluation loss so far
    losses: list[float] = field(default_factory=list)  # the newest, to know a spike by
    nll: float = 0.0  # summed nats since the last log line
    tokens: int = 0  # scored tokens since then
    steps: int = 0  # steps since then
    consumed: str = ""  # the ledger's hash over everything that was learned from
    save_seconds: float = 0.0  # how long the newest save took

    def to_json(self) -> dict[str, Any]:
        """For state.json: floats come back to the last bit."""
        return asdict(self)

    def restore(self, saved: dict[str, Any]) -> None:
        """Becomes what `to_json` gave; in place, since many hold it."""
        for name in asdict(self):
            setattr(self, name, saved[name])
