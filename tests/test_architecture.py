"""The shape of the house: who may import whom, and how long a chapter is. docs/architecture.md says the same."""

import ast
import re

import pytest
from conftest import ROOT

PACKAGE = ROOT / "clm_dist"
FILES = sorted(PACKAGE.rglob("*.py"))
# the ground floor: known to all
BASE = {"config", "disagreements", "errors", "fields", "hub", "progress", "recipe", "storage", "versions"}
# Imports point down: what each wing may know beside the ground floor.
MAY_KNOW = {
    "data": set(),
    "preparation": {"data"},
    "model": set(),
    "publish": set(),
    "watch": set(),
    "ledger": {"data"},
    "planning": {"data", "model"},
    "checkpoint": set(),
    "engine": {"checkpoint", "model"},
    "training": {"data", "model", "publish", "watch", "ledger", "checkpoint", "engine", "planning"},
    "cluster": {"data", "ledger", "watch", "planning"},
    "commands": {"data", "preparation", "model", "training", "publish", "watch", "planning", "cluster"},
    "cli": {"commands", "watch"},
    "__main__": {"cli"},
}
PURE = [
    "config/__init__.py",
    "config/data.py",
    "config/learning.py",
    "config/results.py",
    "disagreements.py",
    "errors.py",
    "recipe.py",
    "data/order.py",
    "data/split.py",
    "preparation/packing.py",
    "preparation/mixture.py",
    "training/schedule.py",
    "training/launch.py",
    "training/gate.py",
    "training/plan.py",
    "training/health.py",
    "training/state.py",
    "watch/watch.py",
    "ledger/ledger.py",
    "planning/deepspeed_schema.py",
    "planning/deepspeed_refusals.py",
    "planning/deepspeed_checks.py",
    "planning/deepspeed_config.py",
    "planning/deepspeed_launch.py",
    "planning/deepspeed_live.py",
    "planning/memory.py",
    "planning/communication.py",
    "planning/estimate.py",
    "planning/planner.py",
    "planning/zero_settings.py",
    *("cluster/batch.py", "cluster/shipped.py", "cluster/topology.py", "cluster/submission.py", "cluster/slurm.py"),
    *("cluster/environment.py", "cluster/task.py", "cluster/stage.py", "cluster/status.py"),
    "publish/courier.py",
    "publish/delivery.py",
    "publish/outbox.py",
    "publish/rows.py",
]


def wing(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path):
    """(module, line) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = wing(path)
    if own == "__init__":
        return
    for module, line in imports(path):
        parts = module.split(".")
        if parts[0] != "clm_dist" or len(parts) < 2:
            continue
        known = parts[1]
        allowed = {own, *BASE, *MAY_KNOW.get(own, set()), "__version__"}
        assert known in allowed, f"{path.name}:{line} imports {module}; {own} may know {sorted(allowed)}"


def test_the_page_shows_these_imports():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", page, re.MULTILINE))
    shown = {name: set(re.findall(r"`(\w+)`", may)) for name, may in rows.items()}
    assert shown == {name: may for name, may in MAY_KNOW.items() if name != "__main__"}


def test_the_page_names_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in FILES:
        if path.name != "__init__.py":
            assert f"`{path.name}`" in page, path.name


@pytest.mark.parametrize("name", PURE)
def test_pure_chapters_know_no_torch(name):
    heavy = {"torch", "accelerate", "transformers", "datasets", "pyarrow", "deepspeed"}
    assert not heavy & {module.split(".")[0] for module, _ in imports(PACKAGE / name)}


@pytest.mark.parametrize("wing_name", ["data", "preparation", "model", "ledger", "checkpoint", "planning", "cluster"])
def test_only_training_and_publish_ask_which_process_they_are(wing_name):
    for path in (PACKAGE / wing_name).glob("*.py"):
        assert not re.search(r"is_main_process|process_index|torch\.distributed|LOCAL_RANK", path.read_text()), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_chapters_are_short_and_documented(path):
    tree = ast.parse(path.read_text())
    assert path.read_text().count("\n") <= 300
    assert ast.get_docstring(tree) or path.name == "__main__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if not node.name.startswith("_") and node in tree.body:
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name} is long"


def test_the_loop_is_a_page():
    tree = ast.parse((PACKAGE / "training" / "train.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    loop = next(node for node in functions["loop"].body if isinstance(node, ast.While))
    assert all(one.end_lineno - one.lineno + 1 <= 50 for one in functions.values())
    assert loop.end_lineno - loop.lineno + 1 <= 40


def test_nothing_happens_on_import():
    """Top-level statements are definitions, imports and constants."""
    for path in FILES:
        if path.name == "__main__.py":
            continue
        for node in ast.parse(path.read_text()).body:
            fine = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
            assert isinstance(node, fine) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)), path


def test_file_names_of_tests_are_unique():
    """pytest imports tests by base name: of two files with one name, the second is not collected."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert sorted(set(names)) == sorted(names)


def test_collectives_never_stand_under_a_question_of_rank():
    """`if is_main_process: reduce(...)` hangs the others."""
    collectives = {"reduce", "gather", "gather_for_metrics", "wait_for_everyone", "all_reduce", "barrier", "broadcast"}
    collectives |= {"get_state_dict", "evaluate", "export", "broadcast_object_list", "gather_object", "compare_ranks"}
    for path in (PACKAGE / "training").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.If) and "is_main_process" in ast.unparse(node.test):
                for call in (c for statement in node.body for c in ast.walk(statement) if isinstance(c, ast.Call)):
                    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
                    assert name not in collectives, f"{path.name}:{call.lineno} {name} under is_main_process"
