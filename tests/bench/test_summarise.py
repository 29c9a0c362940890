"""`scripts/summarise.py`: numbers put together over seeds, and whether README and CSV are stale.

Without these the README could show a table that the results do not bear out.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

SCRIPT = Path(__file__).parents[2] / "scripts" / "summarise.py"
AROUND = ("# Title\n\n<!-- results:begin -->", "<!-- results:end -->\n\n| another | table |\n")
Summarise = Callable[..., int]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module."""
    specification = importlib.util.spec_from_file_location("summarise_script", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    yield module
    del sys.modules[module.__name__]


@pytest.fixture
def summarise(script: ModuleType, tmp_path: Path) -> Summarise:
    """`summarise("--check")`: main on `tmp_path`/results and a README with markers."""
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("\nold\n".join(AROUND))

    def run(flags: str = "") -> int:
        places = ["--results", str(tmp_path / "results"), "--readme", str(tmp_path / "README.md")]
        code: int = script.main([*places, *flags.split()])
        return code

    return run


def a_line(**changes: Any) -> dict[str, Any]:
    """A line as scripts/sweep.py writes it, less what is not summarised."""
    line = {
        "model": "tiny",
        "task": "mrpc",
        "variant": "kwon-search",
        "metric": "mac",
        "constraint": 0.5,
        "seed": 0,
        "requested_samples": 64,
        "eval_limit": None,
        "batch_size": 32,
        "max_length": None,
        "dtype": "float32",
        "metric_name": "accuracy",
        "original_score": 80.4,
        "score": 70.0,
        "divergence": 0.25,
        "evaluated_examples": 408,
        "achieved": {"mac": 0.499, "params": 0.7},
        "seconds": {"collect": 1.0, "prune_total": 3.0},
    }
    return line | changes


def put(folder: Path, *lines: dict[str, Any], name: str = "quality_tiny.jsonl") -> None:
    (folder / "results" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def table_rows(folder: Path) -> list[list[str]]:
    """The cells of the rows between the markers, heads and rule left out for each table."""
    block = (folder / "README.md").read_text().split("results:begin -->")[1].split("<!--")[0]
    rows = [line for line in block.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [row for row in cells if row[0] != "model" and not row[0].startswith("---")]


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results" / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_means_and_spread_over_seeds(summarise: Summarise, tmp_path: Path) -> None:
    scores = {0: (70.0, 0.2), 1: (71.0, 0.3), 2: (75.0, 0.7)}
    put(
        tmp_path,
        *(a_line(seed=seed, score=score, divergence=far) for seed, (score, far) in scores.items()),
    )
    assert summarise() == 0
    expected = ["tiny", "mrpc [80.4] (accuracy, 408 examples)", "kwon-search"]
    assert table_rows(tmp_path) == [[*expected, "72.0 (70.0..75.0) / 0.400"]]
    (row,) = csv_rows(tmp_path)
    assert row["seeds"] == "3"
    assert [float(row[f"score_{name}"]) for name in ("mean", "min", "max")] == [72, 70, 75]
    assert [float(row[f"divergence_{name}"]) for name in ("mean", "min", "max")] == [0.4, 0.2, 0.7]
    assert (row["mac_kept"], row["params_kept"], row["prune_seconds"]) == (
        "0.4990",
        "0.7000",
        "3.0000",
    )
    assert "Means over 3 seeds; 64 calibration examples" in (tmp_path / "README.md").read_text()


def test_constraints_are_columns_and_variants_rows(summarise: Summarise, tmp_path: Path) -> None:
    put(
        tmp_path,
        a_line(variant="second-letter-but-first", constraint=0.3, score=60.0),
        a_line(variant="second-letter-but-first", constraint=0.7, score=78.0),
        a_line(variant="a-later", constraint=0.5, score=77.0),
        name="quality_z.jsonl",
    )
    put(tmp_path, a_line(task="stsb", metric_name="spearmanr", variant="a-later", score=50.0))
    assert summarise() == 0
    text = (tmp_path / "README.md").read_text()
    assert "| 0.7 of MACs | 0.5 of MACs | 0.3 of MACs |" in text
    assert table_rows(tmp_path) == [
        ["tiny", "mrpc [80.4] (accuracy, 408 examples)", "a-later", "", "77.0 / 0.250", ""],
        ["", "", "second-letter-but-first", "78.0 / 0.250", "", "60.0 / 0.250"],
        ["tiny", "stsb [80.4] (spearmanr, 408 examples)", "a-later", "", "50.0 / 0.250", ""],
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"metric": "params"},
        {"requested_samples": 512},
        {"batch_size": 8},
        {"max_length": 64},
        {"dtype": "bfloat16"},
        {"eval_limit": 100, "evaluated_examples": 100},
        {"model": "other"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_conditions_are_never_averaged(
    summarise: Summarise, tmp_path: Path, change: dict[str, Any]
) -> None:
    put(tmp_path, a_line(score=70.0), a_line(seed=1, score=90.0, **change))
    assert summarise() == 0
    assert sorted(row[-1] for row in table_rows(tmp_path)) == ["70.0 / 0.250", "90.0 / 0.250"]
    assert len(csv_rows(tmp_path)) == 2
    one_table = "eval_limit" in change or "model" in change
    assert (tmp_path / "README.md").read_text().count("| variant |") == (1 if one_table else 2)


def test_what_is_around_the_markers_stays(summarise: Summarise, tmp_path: Path) -> None:
    put(tmp_path, a_line())
    assert summarise() == 0
    once = (tmp_path / "README.md").read_text()
    assert once.startswith(AROUND[0])
    assert once.endswith(AROUND[1])
    assert "old" not in once
    assert summarise() == 0
    assert (tmp_path / "README.md").read_text() == once


@pytest.mark.parametrize("stale", ["README.md", "summary.csv"])
def test_check_names_what_is_stale_and_writes_nothing(
    summarise: Summarise, tmp_path: Path, stale: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, a_line())
    assert summarise() == 0
    assert summarise("--check") == 0
    capsys.readouterr()
    path = tmp_path / ("results/summary.csv" if stale == "summary.csv" else stale)
    path.write_text(path.read_text().replace("70.0", "79.0"))
    edited = path.read_bytes()
    assert summarise("--check") == 1
    told = capsys.readouterr().err.splitlines()
    assert told == [f"summarise: {path} is stale: run scripts/summarise.py"]
    assert path.read_bytes() == edited


def test_check_sees_a_new_measurement(
    summarise: Summarise, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, a_line())
    assert summarise() == 0
    put(tmp_path, a_line(), a_line(seed=1))
    capsys.readouterr()
    assert summarise("--check") == 1
    told = capsys.readouterr().err
    assert "summary.csv is stale" in told
    assert "README.md is stale" in told


@pytest.mark.parametrize(
    ("readme", "said"),
    [
        (None, "cannot be read"),
        ("no markers", "needs the lines"),
        ("<!-- results:begin -->", "needs the lines"),
        ("<!-- results:end --> <!-- results:begin -->", "needs the lines"),
        ("<!-- results:begin -->" * 2 + "<!-- results:end -->", "needs the lines"),
        ("<!-- results:begin -->" + "<!-- results:end -->" * 2, "needs the lines"),
    ],
)
@pytest.mark.parametrize("flags", ["", "--check"])
def test_a_readme_without_its_place_is_named(
    summarise: Summarise,
    tmp_path: Path,
    readme: str | None,
    said: str,
    flags: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put(tmp_path, a_line())
    path = tmp_path / "README.md"
    path.unlink()
    if readme is not None:
        path.write_text(readme)
    assert summarise(flags) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("summarise: error: ")
    assert said in message
    assert str(path) in message
    assert not (tmp_path / "results" / "summary.csv").exists()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "holds no quality_"),
        ("{", "line 1 is not a measurement"),
        ("{}", "line 1 is not a measurement"),
        ("[]", "line 1 is not a measurement"),
        (json.dumps(a_line()) + "\n" + json.dumps(a_line(score=None)), "line 2 is not"),
        (json.dumps(a_line(score=1.0)) + "\n" + json.dumps(a_line()), "there twice"),
    ],
    ids=["empty", "cut", "nothing", "list", "no score", "twice"],
)
def test_results_that_are_wrong_are_named(
    summarise: Summarise,
    tmp_path: Path,
    lines: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "results" / "quality_tiny.jsonl").write_text(lines)
    assert summarise() == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert said in message


def test_it_reads_what_sweep_writes(
    summarise: Summarise,
    tmp_path: Path,
    tiny_folder: Callable[..., Path],
    tiny_data_dir: Path,
) -> None:
    specification = importlib.util.spec_from_file_location("s", SCRIPT.with_name("sweep.py"))
    assert specification is not None
    assert specification.loader is not None
    sweep = importlib.util.module_from_spec(specification)
    sys.modules["s"] = sweep
    try:
        specification.loader.exec_module(sweep)
        flags = f"--model {tiny_folder()} --task mrpc --data-dir {tiny_data_dir} --samples 8"
        flags += f" --constraint 0.5 --variant kwon-search --device cpu --output {tmp_path}"
        assert sweep.main((flags + "/results/quality_tiny.jsonl").split()) == 0
    finally:
        del sys.modules["s"]
    assert summarise() == 0
    assert [row["variant"] for row in csv_rows(tmp_path)] == ["kwon-search"]


@given(
    some.lists(
        some.tuples(
            some.sampled_from(["mrpc", "sst2", "rte"]),
            some.sampled_from(["a", "b"]),
            some.sampled_from([0.3, 0.5]),
            some.integers(0, 2),
        ),
        min_size=1,
        unique=True,
    )
)
def test_every_measurement_is_in_exactly_one_cell(
    script: ModuleType, places: list[tuple[str, str, float, int]]
) -> None:
    lines = [
        a_line(task=task, variant=variant, constraint=constraint, seed=seed)
        for task, variant, constraint, seed in places
    ]
    cells = script.cells_of(lines)
    inside = [line for cell in cells for line in cell.lines]
    assert len(inside) == len(lines)
    assert all(line in inside for line in lines)
    found = [(cell.row, cell.constraint) for cell in cells]
    assert len(set(found)) == len(found)
    for cell in cells:
        same = ("task", "variant", "constraint")
        assert len({tuple(line[name] for name in same) for line in cell.lines}) == 1
