"""`verify`: whether a run did what it says, over all its starts; and where its time went."""

from pathlib import Path

from clm_dist.checkpoint.folder import checkpoints
from clm_dist.errors import RunError, UserError
from clm_dist.ledger.audit import audit
from clm_dist.ledger.goodput import goodput, table
from clm_dist.ledger.ledger import read


def verify(run: Path) -> str:
    """What was proved, as lines; RunError with every problem."""
    if not (run / "ledger.jsonl").is_file():
        raise UserError(f"{run} has no ledger.jsonl; give the folder of a run that this version trained")
    findings, states = [], {}
    for one in checkpoints(run / "checkpoints"):
        if one.path.name.startswith("."):  # half-written, as a kill may leave it: the next start passes it over
            continue
        problem = one.problem()
        findings.append((one.path.name, problem))
        if problem is None:
            states[one.step] = one.state()["consumed"]
    found = audit(run, findings, states)
    rows, _ = read(run / "ledger.jsonl")
    text = "\n".join([*found.lines, "", table(goodput(rows))])
    if found.problems:
        raise RunError(
            f"{run} is not what it says:\n" + "\n".join(f"- {problem}" for problem in found.problems) + f"\n{text}"
        )
    return text
