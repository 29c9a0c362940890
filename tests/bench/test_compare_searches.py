"""`scripts/compare_searches.py`, and the paper's latency search that it compares with.

Without these the comparison could rest on a straw man, or on costs that are not the table's.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rfprune.cost.constraint import CostModel
from rfprune.errors import UserError
from rfprune.stages.allocate import allocate
from tests.latency.test_table import TABLE

ROOT = Path(__file__).parents[2]
Tables = list[NDArray[np.float64]]
Problem = tuple[list[str], Tables, CostModel, float]


@pytest.fixture(scope="module", autouse=True)
def _scripts_can_be_imported() -> Iterator[None]:
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def paper() -> ModuleType:
    return importlib.import_module("scripts.paper_search")


def script() -> ModuleType:
    return importlib.import_module("scripts.compare_searches")


@given(st.integers(1, 8), st.floats(0.1, 5), st.floats(0, 5), st.integers(0, 5), st.floats(0, 3))
def test_a_constant_and_a_line_are_found_where_the_table_is_one(
    threshold: int, constant: float, slope: float, more: int, empty: float
) -> None:
    units = np.arange(threshold + more + 1)
    table = empty + np.where(units > 0, constant + slope * np.maximum(units - threshold, 0), 0.0)
    line = paper().fit_line(table)
    assert line.cost(units) == pytest.approx(table - empty, abs=1e-6)


def test_the_fit_is_the_best_of_all_thresholds_and_leaves_out_what_is_not_allowed() -> None:
    table = np.array([0.0, 3, 3.2, 2.8, 4, 5, 6, np.inf, np.inf])
    line = paper().fit_line(table)
    assert (line.threshold, line.slope) == (3, pytest.approx(1.0, abs=0.05))
    assert line.constant == pytest.approx(3.0, abs=0.05)
    flat = paper().fit_line(np.array([0.0, 2, 2, 2]))
    assert flat.cost(np.arange(4)) == pytest.approx([0, 2, 2, 2])
    assert paper().fit_line(np.array([0.0, 3, 2, 1])).slope == 0, "fewer units never cost more"


@st.composite
def problems(draw: st.DrawFn, shapes: tuple[str, ...]) -> Problem:
    """Up to three layers of equal sizes, the units of each worth less and less."""
    layers, sizes = draw(st.integers(1, 3)), {"head": 3, "neuron": 5}
    costs = {}
    for kind, units in sizes.items():
        unit, kept = draw(st.integers(1, 5)), np.arange(units + 1)
        costs[kind] = {
            "linear": unit * kept,
            "overhead": np.where(kept > 0, 2 + unit * kept, 0),
            "stepped": unit * 2 * ((kept + 1) // 2),
            "flat": unit * np.minimum(kept, 1),
            "rough": np.array([0, *draw(st.lists(st.integers(1, 30), min_size=units,
                                                 max_size=units))]),
        }[draw(st.sampled_from(shapes))].astype(np.float64)  # fmt: skip
    kinds = [kind for _ in range(layers) for kind in sizes]
    errors = []
    for kind in kinds:
        worth = draw(st.lists(st.floats(0.1, 9), min_size=sizes[kind], max_size=sizes[kind]))
        errors.append(np.array([0.0, *np.cumsum(sorted(worth))])[::-1].copy())
    model = CostModel("latency", tuple(costs[kind] for kind in kinds), constant=3.0)
    return kinds, errors, model, float(draw(st.integers(1, int(model.original))))


def total(errors: Tables, kept: tuple[int, ...]) -> float:
    return sum(float(error[n]) for error, n in zip(errors, kept, strict=True))


@given(problems(shapes=("linear",)))
def test_on_lines_the_paper_s_search_is_as_good_as_ours(problem: Problem) -> None:
    """So what it loses elsewhere, it loses to the shape of the tables."""
    kinds, errors, costs, budget = problem
    try:
        exact = allocate(errors, costs, budget)
    except UserError:
        assert paper().paper_search(kinds, errors, costs, budget) is None
        return
    found = paper().paper_search(kinds, errors, costs, budget)
    assert costs.total(found) - costs.constant <= budget
    assert total(errors, found) == pytest.approx(total(errors, exact))


@given(problems(shapes=("linear", "overhead", "stepped", "flat", "rough")))
def test_within_the_budget_it_is_never_better_than_the_exact_allocation(problem: Problem) -> None:
    kinds, errors, costs, budget = problem
    lowered = script().within_budget(kinds, errors, costs, budget)
    if lowered is None:
        return
    assert costs.total(lowered) - costs.constant <= budget * (1 + 1e-9)
    exact = allocate(errors, costs, budget)
    assert total(errors, exact) <= total(errors, lowered) + 1e-9


def test_whole_sublayers_are_dropped_the_least_important_first() -> None:
    table = np.array([0.0, 5, 6, 7])
    errors = [np.array([3.0, 2, 1, 0]), np.array([9.0, 4, 2, 0])]
    costs = CostModel("latency", (table, table))
    assert paper().paper_search(["neuron"] * 2, errors, costs, 8.0) == (0, 3)
    assert paper().paper_search(["neuron"] * 2, errors, costs, 14.0) == (3, 3)
    assert paper().paper_search(["neuron"] * 2, errors, costs, 4.0) is None


def test_what_is_not_allowed_is_rounded_down() -> None:
    table = np.array([0.0, np.inf, 2.0, np.inf, 4.0])
    costs = CostModel("latency", (table,))
    assert paper().paper_search(["neuron"], [np.linspace(1, 0, 5)], costs, 3.0) == (2,)


def test_it_writes_what_both_keep_by_table_objective_and_constraint(
    tiny_folder: Callable[..., Path], tiny_data_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "searches.json"
    flags = ["--model", str(tiny_folder()), "--task", "sst2", "--data-dir", str(tiny_data_dir)]
    flags += ["--samples", "12", "--constraint", "0.8", "0.5", "0.05", "--output", str(output)]
    TABLE.save(tmp_path / "measured.json")
    flags += ["--latency-table", str(tmp_path / "measured.json")]
    assert script().main(flags) == 0
    result = json.loads(output.read_text())
    assert max(line.count(",") for line in output.read_text().splitlines()) >= 4, "4 blocks a line"
    assert [entry["table"] for entry in result["tables"]] == ["measured", *script().SYNTHETIC]
    assert result["tables"][0]["conditions"]["device_name"] == TABLE.conditions.device_name
    seen = set()
    for entry in result["tables"]:
        assert set(entry["lines"]) == {"heads", "neurons"}
        for row in entry["rows"]:
            if row["constraint"] == 0.05:
                assert "refused" in row, "the constant alone costs more"
                continue
            exact, lowered = row["exact"], row["paper_lowered"]
            assert exact["budget_used"] <= 1 + 1e-9
            assert 0 < exact["importance_kept"] <= 1
            assert len(exact["kept"]) == 4
            if lowered is not None:
                assert lowered["importance_kept"] <= exact["importance_kept"] + 1e-9
            seen.add((row["objective"], row["constraint"]))
    assert seen == {(o, c) for o in ("importance", "curves") for c in (0.8, 0.5)}
    assert script().main(flags) == 2, "a result is never written over"


def test_a_table_that_is_none_is_one_sentence(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_folder()), "--task", "sst2", "--latency-table", "missing.json"]
    assert script().main([*flags, "--output", str(tmp_path / "out.json")]) == 2
    assert "missing.json" in capsys.readouterr().err


def test_made_up_tables_are_of_the_shapes_they_are_called() -> None:
    block: Any = type("Block", (), {"num_units": 16})
    layout: Any = type("Layout", (), {"blocks": (block,)})
    found = {name: script().synthetic_costs(name, layout).tables[0] for name in script().SYNTHETIC}
    assert all(table[0] == 0 for table in found.values())
    assert np.diff(found["line"]) == pytest.approx(1 / 16)
    assert found["overhead"][1] > 0.2
    assert (found["plateau"][1:9] == 0.5).all()
    assert len(set(found["steps"].tolist())) == 9
