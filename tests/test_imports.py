"""The arrows between the rooms of the package: imports run down only, and no module imports itself in a circle.

Imports under `TYPE_CHECKING` and inside functions count too: a reader follows them all the same.
"""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import castlm

ROOT = Path(castlm.__file__).parent
TIERS = (
    ("cli", "__main__"),
    ("api",),
    ("lab",),
    ("training",),
    ("methods", "distributed", "export", "evaluation"),
    ("patterns",),
    ("structured", "packed"),
    ("oneshot",),
    ("formats",),
    ("data",),
    ("models",),
    ("facts",),
    ("world",),
    ("hardware", "files", "fields", "progress", "signals"),
    ("names", "say", "dtypes", "packages", "devices"),
    ("core",),
)
TIER_OF = {room: len(TIERS) - number for number, rooms in enumerate(TIERS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the package by name."""
    return {
        ".".join(("castlm", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, wherever the import stands in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in known}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports_of(path, known) - {name} for name, path in known.items()}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def arrows_up(arrows: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} -> {target}"
        for name, targets in arrows.items()
        for target in targets
        if room(name) and room(target) and TIER_OF[room(target)] > TIER_OF[room(name)]
    ]


def test_every_room_has_a_tier():
    assert {room(name) for name in modules()} - {""} <= set(TIER_OF)


def test_no_module_imports_itself_in_a_circle():
    TopologicalSorter(graph()).prepare()  # raises CycleError, which names the modules


def test_no_import_runs_up_but_the_one_that_transformers_asks_for():
    """Its table of quantizers must have castlm's row before a packed folder is loaded."""
    assert arrows_up(graph()) == ["castlm.models.io -> castlm.packed.register"]


def test_the_search_finds_an_arrow_that_runs_up():
    assert arrows_up({"castlm.core.nm": {"castlm.training.train"}}) == ["castlm.core.nm -> castlm.training.train"]


def test_core_imports_torch_and_the_standard_library_alone():
    for path in (ROOT / "core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in filter(None, names):
                top = name.split(".")[0]
                # One exception for bad input is shared with castlm-runtime, which castlm depends on.
                is_ours = name.startswith("castlm.core") or name == "castlm_runtime.errors"
                assert top in sys.stdlib_module_names or top == "torch" or is_ours, (path, name)


def test_only_the_command_line_knows_argv():
    for name, path in modules().items():
        if room(name) not in ("cli", "__main__"):
            assert "sys.argv" not in path.read_text(encoding="utf-8"), name
