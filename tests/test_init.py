"""The public API: without these tests a name could lose its documentation, or an example break."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import rfprune

PUBLIC = [name for name in rfprune.__all__ if name != "__version__"]
FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(rfprune, name))]
CLASSES = [name for name in PUBLIC if inspect.isclass(getattr(rfprune, name))]
NEEDS_A_MEASURED_TABLE = ("LatencyTable",)


def home_of(name: str) -> Any:
    """The module that defines a public name."""
    return import_module(rfprune._MODULES[name])


def names_of_rfprune(module: Any) -> set[str]:
    """The names in a module that it defines, or imports from rfprune."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("rfprune"):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            names.add(node.name)
    return names


def annotations_of(name: str) -> list[str]:
    """The types of a function's arguments and result, or of a dataclass's fields."""
    value = getattr(rfprune, name)
    if is_dataclass(value):
        return [str(one.type) for one in fields(value)]
    return list(map(str, value.__annotations__.values()))


@pytest.mark.parametrize("name", rfprune.__all__)
def test_public_name_can_be_used(name: str) -> None:
    assert getattr(rfprune, name) is not None
    assert name in dir(rfprune)


def test_other_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prone'"):
        _ = rfprune.prone


def test_version_is_the_package_s() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^version = "(.+)"', project, re.MULTILINE) == [rfprune.__version__]


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_docstrings_have_every_section(name: str) -> None:
    value = getattr(rfprune, name)
    documented = inspect.getdoc(value) or ""
    sections = set(re.findall(r"^(\w+):$", documented, re.MULTILINE))
    if name in FUNCTIONS:
        assert {"Args", "Example"} <= sections
        returned = inspect.signature(value).return_annotation
        assert returned == "None" or sections & {"Returns", "Yields"}
        assert "Raises" in sections or "errors are those of" in documented
    elif is_dataclass(value):
        assert "Attributes" in sections
        for field in fields(value):
            assert re.search(rf"^    {field.name}:", documented, re.MULTILINE), field.name


@pytest.mark.parametrize("name", [*FUNCTIONS, "Constraint", "PruneResult", "Settings"])
def test_types_in_public_signatures_are_public(name: str) -> None:
    ours = names_of_rfprune(home_of(name))
    used = {word for text in annotations_of(name) for word in re.findall(r"\w+", text)}
    assert used & ours <= set(rfprune.__all__)


class _AnyUnstatedOutput(doctest.OutputChecker):
    """Accepts what an example prints without stating it."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture
def names_in_examples(
    tiny_model: Callable[..., Any],
    tiny_batch: Callable[..., Any],
    tiny_tokenizer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """What the examples take for granted."""
    monkeypatch.chdir(tmp_path)
    model, batches, tokenizer = tiny_model(), [tiny_batch()], tiny_tokenizer()
    result = rfprune.prune(model, batches, rfprune.Constraint("mac", 0.5))
    names = {name: getattr(rfprune, name) for name in PUBLIC}
    return names | {
        "model": model,
        "batches": batches,
        "tokenizer": tokenizer,
        "result": result,
        "torch": torch,
    }


@pytest.mark.parametrize(
    "name", [n for n in [*FUNCTIONS, *CLASSES] if n not in NEEDS_A_MEASURED_TABLE]
)
def test_examples_run(name: str, names_in_examples: dict[str, Any]) -> None:
    value = getattr(rfprune, name)
    if name == "load_pruned":
        names_in_examples["result"].save("smaller", names_in_examples["tokenizer"])
    found = doctest.DocTestFinder().find(value, name, globs=names_in_examples)
    runner = doctest.DocTestRunner(_AnyUnstatedOutput(), verbose=False)
    for example in found:
        runner.run(example)
    assert runner.failures == 0
    assert name not in FUNCTIONS or runner.tries > 0
