"""What was proved of each architecture, with which version of transformers: read from the results of tests/architectures.

`proved/transformers-5.json` and `-4.json`: {"versions": {...}, "rows": {type: {cell: "yes" or "no: why"}}}. Written by
`python tests/architectures/suite.py record`; nobody edits them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clm_dist.model.architectures import BY_TYPE, GUIDE, LATER, Architecture

FOLDER = Path(__file__).parent / "proved"
MAJORS = (5, 4)
# what is proved, and what a cell means
CELLS = {
    "trained": "30 steps in two processes (DDP) on a small corpus",
    "causal": "no prediction moves when later tokens change, at twice the block size",
    "loss falls": "by more than 0.1 nats a token on held-out text",
    "our loss": "reported evaluation loss equals a cross-entropy of the next token written out by hand, before and after",
    "round trip": "the export loads, and its logits are the checkpoint's, to the last bit",
    "resume exact": "from step 15 in two new processes: the same weights at step 30, to the last bit",
    "generate": "the same text before and after the export, and what the model itself finds likeliest",
    "zero2": "trained, evaluated, exported under DeepSpeed's ZeRO-2 likewise; six kinds resumed too",
    "zero3": "the same under ZeRO-3",
    "chunked loss": "loss and gradients by chunks of tokens are those of autograd through whole logits, within 1e-6",
    "checkpointing": "activations computed again, all of a block or some, give the same gradients, to the last bit",
    "bf16": "under autocast the loss is that of fp32 within 2 %",
    "isolation": "documents packed into a block do not see each other",
    "compile": "torch.compile (aot_eager) captures forward and backward, the loss is the same",
    "lora": "peft's adapters train, and merge into the same model",
}


@dataclass(frozen=True)
class Proof:
    """One architecture under one version."""

    row: Architecture
    cells: dict[str, str]


def recorded(major: int) -> dict[str, Any]:
    """What was written down for a version of transformers."""
    path = FOLDER / f"transformers-{major}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"versions": {}, "rows": {}}


def proofs(major: int) -> list[Proof]:
    """Of every architecture that lives there, in the table's order."""
    rows = recorded(major)["rows"]
    return [Proof(row, rows.get(row.type, {})) for row in (*GUIDE, *LATER) if major in row.lives]


def as_json() -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "cells": CELLS,
        "architectures": {
            type_: {"name": row.name, "in_the_guide": row in GUIDE, "guide": row.guide, "needs": dict(row.needs),
                    "lives": list(row.lives)}
            for type_, row in BY_TYPE.items()
        },
        "proved": {f"transformers-{major}": recorded(major) for major in MAJORS},
    }  # fmt: skip


def overview() -> list[str]:
    """A line for each architecture: its type, what the guide's way taught it, whether it is proved here."""
    by_type = {major: {proof.row.type: proof for proof in proofs(major)} for major in MAJORS}
    lines = [f"{'model.type':<22} {'architecture':<22} {'5':<8} {'4.57':<8} the guide's labels=input_ids teaches"]
    for row in (*GUIDE, *LATER):
        marks = [_mark(by_type[major].get(row.type)) for major in MAJORS]
        lines.append(f"{row.type:<22} {row.name:<22} {marks[0]:<8} {marks[1]:<8} {row.guide}".rstrip())
    return [*lines, "`clm-dist architectures TYPE` shows what was proved of one, and the reason for each no"]


def details(type_: str) -> list[str]:
    """All that was proved of one architecture."""
    row = BY_TYPE[type_]
    lines = [f"{row.name} (model.type={type_})", f"as the guide uses it, it is taught {row.guide}"]
    if row.needs:
        lines.append("here it is given " + ", ".join(f"{key}={value}".lower() for key, value in row.needs.items()))
    lines += _facts(row)
    for major in MAJORS:
        versions = recorded(major)["versions"].get("transformers", "5" if major == 5 else "4.57")
        if major not in row.lives:
            lines += ["", f"transformers {versions}: not there"]
            continue
        cells = recorded(major)["rows"].get(type_, {})
        lines += ["", f"transformers {versions}:"]
        lines += [f"  {cell:<14} {cells.get(cell, 'not tried'):<4} {_meaning(cell, cells)}".rstrip() for cell in CELLS]
    return lines


def _facts(row: Architecture) -> list[str]:
    """What else is special about an architecture, in sentences."""
    said = []
    if row.unused:
        said.append(f"weights that no text reaches are frozen: {', '.join(row.unused)}")
    if row.repair is not None:
        said.append("its code in transformers is mended when it is built (clm_dist/model/repairs.py)")
    if row.positions == "axial":
        said.append(
            "blocks are a multiple of its chunks of attention (local_attn_chunk_length), or with axial_pos_embds the "
            "product of axial_pos_shape; attention by hashes over parts of a block is refused"
        )
    else:
        said.append(f"positions: {row.positions}" + (", numbered from the padding id on" if row.reserved else ""))
    if row.needs_padding:
        said.append("one id (pad_token_id) is padding to it wherever it stands: no text may hold it")
    if not row.generates:
        said.append("text is made by a pass over the whole of it for each token: transformers' generate says otherwise")
    return said


def markdown() -> str:
    """The tables of docs/architectures.md: a row for each architecture, and beneath them why a cell is no yes."""
    parts = ["", *(f"- **{cell}**: {meaning}" for cell, meaning in CELLS.items()), ""]
    for major in MAJORS:
        found = recorded(major)
        versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        parts += [
            f"### transformers {found['versions'].get('transformers', major)}",
            "",
            f"Proved with {versions}.",
            "",
        ]
        parts += ["| architecture | `model.type` | " + " | ".join(CELLS) + " |", "|---|---|" + "---|" * len(CELLS)]
        notes: dict[str, int] = {}
        for proof in proofs(major):
            cells = [_short(proof.cells.get(cell), notes) for cell in CELLS]
            parts.append(f"| {proof.row.name} | `{proof.row.type}` | " + " | ".join(cells) + " |")
        parts += ["", *(f"{number}. {note}" for note, number in notes.items()), ""]
    return "\n".join(parts)


def _short(cell: str | None, notes: dict[str, int]) -> str:
    """yes, or no with the number of its reason; a dash where it was not tried."""
    if cell is None:
        return "-"
    verdict, _, why = cell.partition(":")
    verdict, by = (verdict, why.strip()) if why else (cell.partition(",")[0], cell.partition(",")[2].strip())
    return f"{verdict} [{notes.setdefault(by, len(notes) + 1)}]" if by else verdict


def _mark(proof: Proof | None) -> str:
    if proof is None:
        return "gone"
    return "proved" if proof.cells.get("trained") == "yes" else "no"


def _meaning(cell: str, cells: dict[str, str]) -> str:
    return f"({CELLS[cell]})" if cells.get(cell) == "yes" else ""
