"""The examples in the docstrings of the stages give the results that they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import rfprune.stages

MODULES = sorted(module.name for module in pkgutil.iter_modules(rfprune.stages.__path__))
WITH_EXAMPLES = {"allocate", "least_squares", "optimal_brain_surgeon", "rearrange"}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(f"rfprune.stages.{name}"))
    assert failed == 0
    assert (tried > 0) == (name in WITH_EXAMPLES)
