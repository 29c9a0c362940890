"""`scripts/ablate.py` and `scripts/ablation_table.py`: one command, and what the README shows.

Without these the table that compares the method with the classical criteria could mix them up.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rfprune.settings import ALLOCATIONS, CRITERIA, Settings

SCRIPTS = Path(__file__).parents[2] / "scripts"
AROUND = ("# Title\n\n<!-- ablation:begin -->", "<!-- ablation:end -->\n\nmore\n")
Ablate = Callable[..., int]


@pytest.fixture(scope="module")
def ablation() -> Iterator[ModuleType]:
    yield from script("ablate")


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    yield from script("ablation_table")


def script(name: str) -> Iterator[ModuleType]:
    """A script as a module."""
    specification = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules[module.__name__]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results" / "ablation_tiny.jsonl"


@pytest.fixture
def ablate(
    ablation: ModuleType, tiny_folder: Callable[..., Path], tiny_data_dir: Path, output: Path
) -> Ablate:
    """`ablate("--seed 0 1 ...")`: main on a tiny model, MRPC, 16 samples; later flags win."""

    def run(flags: str = "") -> int:
        always = f"--model {tiny_folder()} --task mrpc --data-dir {tiny_data_dir} --device cpu "
        always += f"--samples 16 --batch-size 8 --constraint 0.5 --output {output} "
        code: int = ablation.main((always + flags).split())
        return code

    return run


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_every_cell_of_the_table_is_a_variant(ablation: ModuleType) -> None:
    variants = {name: Settings(**asked) for name, asked in ablation.variants().items()}
    assert len(set(variants.values())) == len(variants), "no two variants are the same thing"
    for tune in (True, False):
        one_shot = {
            (settings.importance, settings.allocation)
            for settings in variants.values()
            if (settings.method, settings.rounds, settings.tune) == ("importance", 1, tune)
        }
        assert one_shot == {(i, a) for i in CRITERIA for a in ALLOCATIONS}
        others = [s for s in variants.values() if s.tune == tune and s.method != "importance"]
        assert [settings.method for settings in others] == ["kwon", "curvature"]
        in_rounds = [s for s in variants.values() if s.tune == tune and s.rounds > 1]
        assert {settings.importance for settings in in_rounds} == {"taylor", "fisher"}
    for name, settings in variants.items():
        assert name.endswith("-select") == (not settings.tune)


def test_one_command_measures_and_prints(
    ablate: Ablate, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = "random-uniform random-uniform-select taylor-global taylor-global-rounds-3 curvature"
    flags = f"--constraint 0.7 0.5 --seed 0 1 --variant {chosen}"
    assert ablate(flags) == 0
    lines = lines_of(output)
    found = [(line["seed"], line["variant"]) for line in lines if line["constraint"] == 0.5]
    assert found == [
        *((0, name) for name in chosen.split()),
        *((1, name) for name in chosen.split()[:2]),
    ], "other seeds are for random importance alone"
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in shown.splitlines()[2:]]
    assert rows[0] == [
        *("importance", "allocation", "rounds"),
        *("0.7 pruned", "0.7 refitted", "0.5 pruned", "0.5 refitted"),
    ]
    by_name = {tuple(row[:3]): row[3:] for row in rows[2:]}
    assert list(by_name) == [
        ("taylor", "global", "1"),
        ("taylor", "global", "3"),
        ("random", "uniform", "1"),
        ("`--method curvature`", "", "1"),
    ]
    for line in lines:
        name = line["variant"].split("-")[0]
        if name in ("taylor", "curvature"):
            key = ("taylor", "global") if name == "taylor" else ("`--method curvature`", "")
            row = by_name[(*key, str(line["settings"]["rounds"]))]
            shown_cell = row[1 if line["constraint"] == 0.7 else 3]
            assert shown_cell == f"{line['score']:.1f} / {line['divergence']:.3f}"
            assert row[0] == row[2] == ""
    before = output.read_bytes()
    assert ablate(flags) == 0
    assert output.read_bytes() == before
    assert capsys.readouterr().out == shown


def a_line(**changes: Any) -> dict[str, Any]:
    """A line as scripts/ablate.py writes it, less what the tables do not show."""
    line = {
        "model": "tiny",
        "task": "sst2",
        "variant": "taylor-global",
        "metric": "mac",
        "constraint": 0.5,
        "seed": 0,
        "requested_samples": 64,
        "eval_limit": None,
        "batch_size": 32,
        "max_length": None,
        "dtype": "float32",
        "metric_name": "accuracy",
        "original_score": 89.1,
        "score": 88.0,
        "divergence": 0.02,
        "evaluated_examples": 872,
        "settings": {
            "method": "importance",
            "importance": "taylor",
            "allocation": "global",
            "rounds": 1,
            "tune": True,
        },
    }
    settings = {**line["settings"], **changes.pop("settings", {})}  # type: ignore[dict-item]
    return {**line, "settings": settings, **changes}


def put(folder: Path, *lines: dict[str, Any]) -> None:
    (folder / "results").mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "results" / "ablation_tiny.jsonl").write_text(text)
    (folder / "README.md").write_text("\nold\n".join(AROUND))


def update(table: ModuleType, folder: Path, *flags: str) -> int:
    places = ["--results", str(folder / "results"), "--readme", str(folder / "README.md")]
    code: int = table.main([*places, *flags])
    return code


def test_the_readme_shows_pruned_and_refitted_side_by_side(
    table: ModuleType, tmp_path: Path
) -> None:
    select = {"variant": "taylor-global-select", "settings": {"tune": False}}
    put(
        tmp_path,
        a_line(),
        a_line(**select, score=80.0, divergence=0.5),
        a_line(**select, score=70.0, constraint=0.3),
        *(
            a_line(
                variant="random-uniform",
                settings={"importance": "random", "allocation": "uniform"},
                seed=seed,
                score=50.0 + seed,
                task="stsb",
                original_score=84.11,
            )
            for seed in range(3)
        ),
        a_line(
            variant="kwon",
            settings={"method": "kwon", "importance": "fisher"},
            score=85.0,
            task="stsb",
        ),
    )
    assert update(table, tmp_path, "--check") == 1
    assert update(table, tmp_path) == 0
    assert update(table, tmp_path, "--check") == 0
    readme = (tmp_path / "README.md").read_text()
    assert "old" not in readme
    assert readme.startswith(AROUND[0]) and readme.endswith(AROUND[1])
    assert readme.splitlines()[4:9] == [
        "| importance | allocation | rounds | sst2 [89.1] at 0.5 | sst2 [89.1] at 0.3 "
        "| stsb [84.1] at 0.5 |",
        "|---|---|---|---|---|---|",
        "| taylor | global | 1 | 80.0 → 88.0 | 70.0 → – |  |",
        "| random | uniform | 1 |  |  | – → 51.0 |",
        "| `--method kwon` |  | 1 |  |  | – → 85.0 |",
    ]
    full = (tmp_path / "results" / "ablation.md").read_text()
    assert "| taylor | global | 1 | 80.0 / 0.500 | 88.0 / 0.020 | 70.0 / 0.020 |  |" in full
    assert "| random | uniform | 1 |  | 51.0 (50.0..52.0) / 0.020 |" in full
    assert "**tiny, stsb**" in full


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no ablation_"),
        ("not JSON\n", "line 1 is not a measurement of scripts/ablate.py"),
        ('{"model": "tiny"}\n', "line 1 is not a measurement"),
        (2 * (json.dumps(a_line()) + "\n"), "is there twice"),
    ],
)
def test_what_is_no_measurement_is_said(
    text: str, said: str, table: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path)
    (tmp_path / "results" / "ablation_tiny.jsonl").write_text(text)
    assert update(table, tmp_path) == 2
    message = capsys.readouterr().err
    assert message.startswith("ablation_table: error: ")
    assert said in message
    assert "old" in (tmp_path / "README.md").read_text()


def test_other_results_are_none_of_the_summarys(table: ModuleType, tmp_path: Path) -> None:
    """`scripts/summarise.py` reads the folder too: the two kinds of file keep apart."""
    put(tmp_path, a_line())
    (tmp_path / "results" / "quality_tiny.jsonl").write_text("not for this table\n")
    assert update(table, tmp_path) == 0
    from scripts.summarise import read_results

    (tmp_path / "results" / "quality_tiny.jsonl").unlink()
    with pytest.raises(Exception, match="holds no quality_"):
        read_results(tmp_path / "results")
