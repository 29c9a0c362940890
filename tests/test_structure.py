"""The shape of the package: which module may import which, and what is imported when.

Deleting this lets the layers grow together and `--help` wait for torch, unnoticed.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rfprune"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
MAX_ROOT_MODULES = 10

# The parts of the package from the top down: a module imports its own part and parts below.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("main",),
    ("cli",),
    ("hub",),
    ("export",),
    ("max_drop",),
    ("report",),
    ("checkpoints",),
    ("vocabulary",),
    ("demo",),
    ("tasks",),
    ("pruning",),
    ("methods",),
    ("cache",),
    ("result",),
    ("latency",),
    ("stages",),
    ("cost",),
    ("model",),
    ("families",),
    ("distributed", "embeddings", "settings"),
    ("errors",),
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

# Parts that know less than their place in the order allows.
KNOWS_ONLY: dict[str, set[str]] = {
    "tasks": {"embeddings", "settings", "errors"},  # nothing of pruning
    "demo": set(),
}

# evaluate loads these as scripts of their own, so they import it at their top.
HEAVY_ON_PURPOSE = "metric_modules"


def part_of(module: str) -> str:
    """The first name below rfprune: `rfprune.model.layout` is in part `model`."""
    return ([*module.split("."), "__init__"])[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST, known: set[str], root: str = "rfprune") -> Iterator[str]:
    """The modules below `root` that a module imports, at its top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in full]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == root)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


KNOWN = {module_name(path) for path in MODULES}
IMPORTS = {module_name(path): set(imported_modules(parsed(path), KNOWN)) for path in MODULES}


def wrong_imports(module: str, imported: set[str]) -> list[str]:
    """What a module imports against the order of the layers."""
    own = part_of(module)
    wrong = []
    for other in sorted(imported):
        part = part_of(other)
        if part == own:
            continue
        if part == "__init__" or RANK[part] <= RANK[own] or part not in KNOWS_ONLY.get(own, RANK):
            wrong.append(other)
    return wrong


def test_every_part_has_its_place() -> None:
    assert {part_of(module) for module in KNOWN} - {"__init__"} == set(RANK)


def test_the_package_root_fits_on_one_screen() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_ROOT_MODULES


@pytest.mark.parametrize("module", sorted(KNOWN - {"rfprune"}))
def test_imports_go_one_way(module: str) -> None:
    assert wrong_imports(module, IMPORTS[module]) == []


def test_no_modules_import_each_other() -> None:
    """Neither inside a part, where the order of the layers says nothing, nor among the scripts."""
    scripts = {module_name(path): path for path in SCRIPTS}
    left = {module: imported & KNOWN for module, imported in IMPORTS.items()}
    left |= {
        module: set(imported_modules(parsed(path), set(scripts), "scripts"))
        for module, path in scripts.items()
    }
    while free := {module for module, imported in left.items() if not imported & left.keys()}:
        for module in free:
            del left[module]
    assert not left


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("rfprune.stages.search", "from rfprune.pruning import prune", "rfprune.pruning"),
        ("rfprune.stages.search", "import rfprune.methods.kwon", "rfprune.methods.kwon"),
        ("rfprune.cli.run", "from rfprune import __version__", "rfprune"),
        ("rfprune.tasks.splits", "from rfprune.model.layout import Layout", "rfprune.model.layout"),
    ],
)
def test_the_direction_test_sees_a_wrong_import(module: str, line: str, wrong: str) -> None:
    tree = ast.parse(f"def late():\n    {line}\n    from rfprune.errors import UserError")
    assert wrong_imports(module, set(imported_modules(tree, KNOWN))) == [wrong]


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is_and_prints_nothing(path: Path) -> None:
    tree = parsed(path)
    assert ast.get_docstring(tree), "a module starts with what it is for"
    if path in MODULES:
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        printed = [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
        assert not printed, "a library does not print"


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if HEAVY_ON_PURPOSE not in p.parts and p.stem != "__main__"],
    ids=module_name,
)
def test_module_can_be_imported(path: Path) -> None:
    importlib.import_module(module_name(path))


def test_importing_everything_leaves_the_slow_libraries_alone() -> None:
    """datasets, evaluate and matplotlib cost seconds: they are imported where they are used."""
    names = [module_name(path) for path in MODULES if HEAVY_ON_PURPOSE not in path.parts]
    names.remove("rfprune.__main__")
    loaded = modules_after("; ".join(f"import {name}" for name in names))
    assert "torch" in loaded
    assert not loaded & {"datasets", "evaluate", "matplotlib", "pandas", "onnx", "onnxruntime"}


def test_importing_rfprune_loads_no_torch() -> None:
    loaded = modules_after("import rfprune, rfprune.main, rfprune.settings")
    assert not loaded & {"torch", "transformers", "numpy"}


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["--model", "demo", "--task", "sst3", "--constraint", "0.5"], 2),
        (["--model", "demo", "--task", "sst2", "--constraint", "1.5"], 2),
        (["--bogus"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_bad_flags_answer_before_torch_is_imported(flags: list[str], code: int) -> None:
    program = f"from rfprune.main import main\ntry: code = main({flags!r})\n"
    program += f"except SystemExit as exit: code = exit.code\nassert code == {code}, code"
    assert not modules_after(program) & {"torch", "transformers", "numpy"}


def modules_after(program: str) -> set[str]:
    """The modules that a new process has loaded after running a program."""
    show = "\nimport sys; sys.stdout.write('\\n' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program + show],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())
