"""Examples in docstrings give the results that they show; the README's snippet prunes a model."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import rfprune.stages
from rfprune.cost.macs import total_macs
from rfprune.model.layout import layout_of

FOLDER = Path(rfprune.stages.__path__[0])
MODULES = sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)]))
WITH_EXAMPLES = {
    *("allocate", "densities", "depth", "least_squares", "optimal_brain_surgeon", "rearrange"),
    *("sparsify", "tensor_store"),
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(f"rfprune.stages.{name}"))
    assert failed == 0
    assert (tried > 0) == (name in WITH_EXAMPLES)


def test_the_snippet_of_the_readme_prunes_to_its_constraint() -> None:
    snippet = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)[-1]
    found: dict[str, Any] = {}
    exec(snippet, found)
    assert found["warnings"] == []
    sizes = [total_macs(layout_of(found[name]), 32) for name in ("student", "model")]
    assert 0.4 < sizes[0] / sizes[1] <= 0.5


def test_the_sections_and_modules_that_the_readme_names_exist() -> None:
    text = (FOLDER / "README.md").read_text()
    links = [link.partition("#") for link in re.findall(r"\]\((?!http)([^)]+)\)", text)]
    for file, _, section in links:
        target = FOLDER / (file or "README.md")
        if section:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]
            assert section in slugs
    named = {Path(file).name for file, _, _ in links} | {"__init__.py"}
    assert {path.name for path in FOLDER.glob("*.py")} <= named
