"""`scripts/bad_inputs.py`: enough cases of every group, a few of them run, and failures seen.

Deleting this lets the script rot, or call a traceback an answer.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bad_inputs.py"

FEW = (
    *("no flags at all", "`--constraint 1.5`", "a line break and a colour code in `--model`"),
    *("-4 heads", "weights as a pickle", "code for model, configuration and tokenizer"),
    *("a csv in Latin-1", "a modelling file that was edited", "a newer format version"),
    *("a mask one unit short", "a unit that the model does not have", "a link to nowhere"),
    *("a text of three words", "fewer tags than words", "images: one class"),
    *("the current folder (empty), as `.`", "the root, as `/`", "../../etc/passwd"),
)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    specification = importlib.util.spec_from_file_location("bad_inputs", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["bad_inputs"] = module  # dataclasses look there
    specification.loader.exec_module(module)
    yield module
    del sys.modules["bad_inputs"]


@pytest.fixture(scope="module")
def chosen(script: ModuleType) -> list[Any]:
    return [
        case for case in script.CASES if any(case.given.startswith(few) or few in case.given
                                             for few in FEW)
    ]  # fmt: skip


def test_there_are_cases_enough_and_none_twice(script: ModuleType) -> None:
    names = [(case.group, case.given) for case in script.CASES]
    assert len(set(names)) == len(names) >= 70
    assert {group for group, _ in names} == set(script.GROUPS)


def test_a_few_are_answered_and_what_is_wrong_with_an_answer_is_seen(
    script: ModuleType, chosen: list[Any]
) -> None:
    cut = next(case for case in chosen if case.given == "no flags at all")
    spoilt = [
        replace(cut, says="something else"),
        replace(cut, prepare=lambda _: _raises(RuntimeError("bug"))),
        replace(cut, prepare=lambda _: lambda: Path("left").write_text("a")),
        replace(cut, prepare=lambda _: ["--version"]),
    ]
    assert len(chosen) >= len(FEW)
    answers = list(script.try_all([*chosen, *spoilt]))
    for case, answer in zip(chosen, answers, strict=False):
        assert answer.problems == (), case.given
    other, bug, left, version = (answer.problems for answer in answers[len(chosen) :])
    assert other == ("does not say 'something else'",)
    assert bug[0].startswith("Traceback")
    assert any(problem.startswith("left or changed: here/") for problem in left)
    assert any(problem.startswith("prints 'rfprune ") for problem in version)
    text = script.table([*chosen, cut], [*answers[: len(chosen)], answers[len(chosen)]])
    assert "1 not." in text
    assert "**FAILED**: does not say" in text
    assert text.count("\n| ") == len(chosen) + 1 + text.count("| given |")


def _raises(error: Exception) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call
