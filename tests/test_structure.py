"""The shape of the package: which module may know which, how long files are, what is imported when.

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
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
MAX_LINES = 350

# Each part of the package and the parts it may import, besides itself and errors.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"cost", "model", "pipeline", "result"},
    "errors": set(),
    "embeddings": set(),
    "sentences": {"embeddings"},
    "model": set(),
    "timing": set(),
    "cost": {"model", "timing"},
    "processes": set(),
    "stages": {"cost", "embeddings", "model", "processes"},
    "checks": {"model"},
    "promise": {"cost", "model", "timing"},
    "result": {"cost", "model", "promise", "stages"},
    "cache": {"processes", "result"},
    "selection": {"cache", "cost", "model", "result", "stages"},
    "pipeline": {
        *("checks", "cost", "model", "processes", "promise", "result", "selection", "stages"),
    },
    "tasks": {"embeddings"},
    "calibration": {"tasks"},
    "demo": {"tasks"},
    "output": set(),
    "evidence": {"model", "result", "tasks"},
    "report": {"__init__", "output", "tasks", "timing"},
    "flag_values": set(),
    "data_flags": {"__init__", "flag_values", "tasks"},
    "method_flags": {"__init__", "flag_values"},
    "command_line": {
        *("__init__", "data_flags", "flag_values", "hub_flags", "method_flags", "output", "tasks"),
    },
    "hub_flags": {"report"},
    "device": set(),
    "inspection": {"model", "tasks"},
    "precision": set(),
    "trouble": {"inspection"},
    "max_drop": set(),
    "probing": {
        *("cost", "max_drop", "measure", "model", "precision", "processes", "report", "result"),
        *("selection", "stages", "tasks"),
    },
    "loading": {"checks", "demo", "embeddings", "inspection", "model", "sentences", "tasks"},
    "measure": {
        *("cache", "command_line", "cost", "evidence", "loading", "model", "report", "result"),
        "tasks",
    },
    "onnx_export": set(),
    "export": {"cost", "model", "onnx_export", "report", "result", "tasks", "timing"},
    "run": {
        *("cache", "calibration", "command_line", "cost", "data_flags", "device", "export"),
        *("loading", "measure", "probing", "selection", "sentences", "trouble"),
        *("model", "output", "pipeline", "precision", "processes", "report", "result", "tasks"),
    },
    "main": {"command_line", "run"},
}

# evaluate loads these as scripts of their own, so they import it at their top.
HEAVY_ON_PURPOSE = "metric_modules"


def part_of(path: Path) -> str:
    """The first name below rfprune: `rfprune/model/layout.py` is in part `model`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_parts(tree: ast.AST) -> Iterator[str]:
    """The parts of rfprune that a module imports, at its top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "rfprune":
                in_package = bool(rest) and (
                    (PACKAGE / rest[0]).is_dir() or (PACKAGE / f"{rest[0]}.py").is_file()
                )
                yield rest[0] if in_package else "__init__"


def test_every_part_has_its_place() -> None:
    assert {part_of(path) for path in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    allowed = MAY_IMPORT[part] | {part, "errors"}
    assert set(imported_parts(ast.parse(path.read_text(encoding="utf-8")))) <= allowed


def test_the_direction_test_sees_a_wrong_import() -> None:
    tree = ast.parse(
        "def late():\n    from rfprune.pipeline import prune\n    import rfprune.model"
    )
    assert set(imported_parts(tree)) == {"pipeline", "model"}


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_says_what_it_is_in_few_lines_and_prints_nothing(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module starts with what it is for"
    assert len(text.splitlines()) <= MAX_LINES, "a file is read in one sitting"
    if path in MODULES:
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        printed = [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
        assert not printed, "a library does not print"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if HEAVY_ON_PURPOSE not in p.parts], ids=module_name
)
def test_module_can_be_imported(path: Path) -> None:
    importlib.import_module(module_name(path))


def test_importing_everything_leaves_the_slow_libraries_alone() -> None:
    """datasets, evaluate and matplotlib cost seconds: they are imported where they are used."""
    names = [module_name(path) for path in MODULES if HEAVY_ON_PURPOSE not in path.parts]
    loaded = modules_after("; ".join(f"import {name}" for name in names))
    assert "torch" in loaded
    assert not loaded & {"datasets", "evaluate", "matplotlib", "pandas", "onnx", "onnxruntime"}


def test_importing_rfprune_loads_no_torch() -> None:
    assert not modules_after("import rfprune, rfprune.main") & {"torch", "transformers", "numpy"}


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
