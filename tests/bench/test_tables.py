"""`scripts.bench.tables`: numbers over the seeds, what is stale, and which lines are shown.

Without these tests README.md and results/ could show numbers that the result files do not hold.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rfprune.settings import Settings
from scripts.bench import tables
from scripts.bench.score_tables import cells_of

PEERS = "task,method,model,source,dense,0.7,0.5,0.3\nmrpc,Kwon,BERT,a log,86.3,86.8,83.3,\n"
Update = Callable[..., int]


@pytest.fixture
def update(tmp_path: Path) -> Update:
    """`update("--check")`: main on `tmp_path`/results and READMEs with empty sections."""
    results = tmp_path / "results"
    results.mkdir()
    (results / "peers.csv").write_text(PEERS)
    sections = [*tables.SECTIONS, "studies", "provenance"]
    (results / "README.md").write_text("".join(map(section, sections)))
    (results / "h100.md").write_text("".join(map(section, tables.EARLIER)))
    (tmp_path / "README.md").write_text(f"# Title\n\n{section('results')}\n\nmore\n")

    def run(flags: str = "") -> int:
        places = ["--results", str(results), "--readme", str(tmp_path / "README.md")]
        return tables.main([*places, *flags.split()])

    return run


def section(name: str) -> str:
    return f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n"


def a_line(**changes: Any) -> dict[str, Any]:
    """A line of `scripts.bench.quality`, without what no table shows."""
    line = {
        "model": "tiny",
        "task": "mrpc",
        "variant": "curvature",
        "metric": "mac",
        "constraint": 0.5,
        "seed": 0,
        "requested_samples": 64,
        "samples": 64,
        "mean_tokens": 13.0,
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
        "settings": dataclasses.asdict(Settings()),
        "versions": {"rfprune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "code": "0123456789abcdef",
        "measured_at": "2026-11-28T10:00:00Z",
    }
    settings = {**line["settings"], **changes.pop("settings", {})}  # type: ignore[dict-item]
    return {**line, "settings": settings, **changes}


def put(folder: Path, *lines: dict[str, Any], name: str = "quality_tiny.jsonl") -> None:
    (folder / "results" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def page(folder: Path, name: str) -> str:
    """The text of a section of results/README.md."""
    text = (folder / "results" / "README.md").read_text()
    return text.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]


def rows_of(text: str) -> list[list[str]]:
    """The cells of all table rows, without heads and rules."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    rules = [index for index, row in enumerate(cells) if row[0] == "---"]
    return [row for i, row in enumerate(cells) if i not in rules and i + 1 not in rules]


def test_stale_tables_are_found_and_written(update: Update, tmp_path: Path) -> None:
    put(tmp_path, a_line())
    before = (tmp_path / "README.md").read_text()
    assert update("--check") == 1
    assert (tmp_path / "README.md").read_text() == before
    assert update() == 0
    assert update("--check") == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("# Title\n\n<!-- results:begin -->\n\n|")
    assert readme.endswith("<!-- results:end -->\n\n\nmore\n")
    assert rows_of(readme) == [
        ["mrpc", "Kwon", "BERT", "86.3", "86.8", "83.3", "", "a log"],
        ["mrpc", "rfprune, curvature", "tiny", "80.4", "", "70.0", "", "measured here"],
    ]
    assert page(tmp_path, "scale").strip() == "Not measured yet."
    put(tmp_path, a_line(score=71.0))
    assert update("--check") == 1
    assert update() == 0
    picture = tmp_path / "results" / "summary.png"
    picture.write_bytes(b"of other numbers")
    assert update("--check") == 1
    assert update() == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_means_and_spread_over_seeds(update: Update, tmp_path: Path) -> None:
    scores = {0: (70.0, 0.2), 1: (71.0, 0.3), 2: (75.0, 0.7)}
    put(
        tmp_path,
        *(a_line(seed=seed, score=score, divergence=far) for seed, (score, far) in scores.items()),
    )
    assert update() == 0
    names = ["tiny", "mrpc [80.4] (accuracy, 408 examples)", "curvature"]
    assert rows_of(page(tmp_path, "quality")) == [[*names, "72.0 (70.0..75.0) / 0.400"]]
    assert "Means over 3 seeds; 64 calibration examples" in page(tmp_path, "quality")


def test_constraints_are_columns_and_variants_rows(update: Update, tmp_path: Path) -> None:
    put(
        tmp_path,
        a_line(variant="second-letter-but-first", constraint=0.3, score=60.0),
        a_line(variant="second-letter-but-first", constraint=0.7, score=78.0),
        a_line(variant="a-later", score=77.0),
    )
    put(tmp_path, a_line(task="stsb", variant="a-later", score=50.0), name="quality_a.jsonl")
    assert update() == 0
    assert "| 0.7 of MACs | 0.5 of MACs | 0.3 of MACs |" in page(tmp_path, "quality")
    assert rows_of(page(tmp_path, "quality")) == [
        ["tiny", "mrpc [80.4] (accuracy, 408 examples)", "a-later", "", "77.0 / 0.250", ""],
        ["", "", "second-letter-but-first", "78.0 / 0.250", "", "60.0 / 0.250"],
        ["tiny", "stsb [80.4] (accuracy, 408 examples)", "a-later", "", "50.0 / 0.250", ""],
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"metric": "params"},
        {"requested_samples": 512},
        {"max_length": 64},
        {"dtype": "bfloat16"},
        {"eval_limit": 100, "evaluated_examples": 100},
        {"model": "other"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_conditions_are_never_averaged(change: dict[str, Any]) -> None:
    assert len(cells_of([a_line(), a_line(seed=1)])) == 1
    assert len(cells_of([a_line(), a_line(seed=1) | change])) == 2


def test_a_line_without_its_code_stands_in_no_table_of_todays_code(
    update: Update, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the H100 page shows such lines: GPU measurements from before lines recorded it."""
    own = Path(__file__).parents[2] / "results" / "scale_llama_cuda_float32.jsonl"
    line = json.loads(own.read_text().splitlines()[0])
    put(tmp_path, line, name=own.name)
    assert update() == 0
    assert page(tmp_path, "scale").strip() == "Not measured yet."
    names = [row[0] for row in rows_of((tmp_path / "results" / "h100.md").read_text())]
    assert names == ["NVIDIA H100 80GB HBM3, float32, 64 x 512"]
    assert rows_of(page(tmp_path, "provenance"))[0][5] == "not recorded"
    put(tmp_path, line | {"code": "0123456789abcdef"}, name=own.name)
    assert update() == 0
    assert len(rows_of(page(tmp_path, "scale"))) == 1
    assert not rows_of((tmp_path / "results" / "h100.md").read_text())
    put(tmp_path, a_line(), a_line(constraint=0.7, code=None))
    assert update() == 2
    assert "Line 2 of quality_tiny.jsonl has no `code`" in capsys.readouterr().err


def test_hours_count_a_shared_collection_once() -> None:
    def line(constraint: float, seed: int) -> dict[str, Any]:
        seconds = {"collect": 1800.0, "tune": 360.0, "prune_total": 2160.0, "evaluate": 360.0}
        return a_line(constraint=constraint, seed=seed, seconds=seconds)

    assert tables.hours([line(0.5, 0)]) == "0.7"
    assert tables.hours([line(0.5, 0), line(0.3, 0)]) == "0.9"
    assert tables.hours([line(0.5, 0), line(0.3, 1)]) == "1.4"
    assert tables.hours([{"seconds": 1000.0}, {"seconds": 900}]) == "0.6"
    assert tables.hours([line(0.5, 0), {"machine": {}}]) == "", "not all of it is known"


def test_criteria_stand_without_and_with_the_fit(update: Update, tmp_path: Path) -> None:
    taylor = {"method": "importance", "importance": "taylor"}
    rounds = {"method": "importance", "importance": "random", "allocation": "uniform"}
    put(
        tmp_path,
        a_line(variant="curvature", score=85.0),
        *(a_line(variant="r", settings=rounds, seed=seed, score=50.0 + seed) for seed in range(3)),
        a_line(variant="taylor-global", settings=taylor, score=88.0, divergence=0.02),
        a_line(variant="taylor-global-select", settings={**taylor, "tune": False}, score=80.0),
        name="ablation_tiny.jsonl",
    )
    assert update() == 0
    text = page(tmp_path, "ablation")
    assert "| importance | allocation | rounds | 0.5 pruned | 0.5 fitted |" in text
    assert rows_of(text) == [
        ["taylor", "global", "1", "80.0 / 0.250", "88.0 / 0.020"],
        ["random", "uniform", "1", "", "51.0 (50.0..52.0) / 0.250"],
        ["`--method curvature`", "", "1", "", "85.0 / 0.250"],
    ]


def test_studies_have_a_table_each(update: Update, tmp_path: Path) -> None:
    put(tmp_path, a_line(), a_line(requested_samples=512, score=75.0), name="study_samples.jsonl")
    put(tmp_path, a_line(model="other"), name="study_rounds.jsonl")
    assert update() == 0
    rows = rows_of(page(tmp_path, "studies"))
    assert rows == [
        ["64", "curvature", "70.0 / 0.250", "3"],
        ["64", "curvature", "70.0 / 0.250", "3"],
        ["512", "curvature", "75.0 / 0.250", "3"],
    ]


def test_decoders_have_a_short_table_and_a_page(update: Update, tmp_path: Path) -> None:
    text = {"film": "was *good* | fine\n<b>"}
    line = a_line(written=text, written_by_original=text, peak_memory_bytes=2**31)
    put(tmp_path, line, line | {"constraint": 0.3, "divergence": None}, name="decoder_t.jsonl")
    assert update() == 0
    assert rows_of(page(tmp_path, "decoders"))[0][2:] == ["70.0 (0.250)", "70.0"]
    full = (tmp_path / "results" / "decoders.md").read_text()
    assert "*film* was \\*good\\* \\| fine &lt;b>" in full
    assert "2.0 GiB" in full


def test_perplexity_by_tokens_has_standard_errors(update: Update, tmp_path: Path) -> None:
    line = a_line(peak_memory_bytes=2**31, constraint=0.8)
    nats = {"original": [3.0, 4.0], "pruned": [3.1, 4.3]}  # mean 3.7 after losing 0.1 and 0.3
    put(tmp_path, {**line, "nats": nats}, name="tokens_t.jsonl")
    assert update() == 0
    ((model, macs, calibration, *numbers),) = rows_of(page(tmp_path, "tokens"))
    assert [model, macs, calibration] == ["tiny [80.4]", "0.8", "64 x 13 tokens"]
    assert numbers[:3] == ["40.45 (24.27)", "1.22 (0.12)", "0.250"]
    assert numbers[3] == "1 s"
    assert numbers[-1] == "2.0 GiB"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not JSON\n", "Line 1 of quality_tiny.jsonl is not a result"),
        ('{"model": "tiny", "code": "0"}\n', "Line 1 of quality_tiny.jsonl is not a result"),
        (json.dumps(a_line()) + "\n{}\n", "Line 2 of quality_tiny.jsonl has no `code`"),
        (2 * (json.dumps(a_line()) + "\n"), "two results of one seed"),
    ],
)
def test_a_line_that_is_no_result_is_named(
    text: str, words: str, update: Update, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results" / "quality_tiny.jsonl").write_text(text)
    assert update() == 2
    message = capsys.readouterr().err
    assert message.startswith("tables: error: ")
    assert words in message
    assert "old" in (tmp_path / "README.md").read_text()


def test_markers_are_needed_once_each(
    update: Update, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, a_line())
    for text in (
        "no markers",
        2 * section("results"),
        "<!-- results:end --><!-- results:begin -->",
    ):
        (tmp_path / "README.md").write_text(text)
        assert update() == 2
        assert "once each" in capsys.readouterr().err
        assert (tmp_path / "README.md").read_text() == text


def test_the_tables_of_times_show_the_lines_of_this_repository(
    update: Update, tmp_path: Path
) -> None:
    """Each kind of line that is kept has its table, and none is left out."""
    own = Path(__file__).parents[2] / "results"
    for path in own.glob("*.jsonl"):
        (tmp_path / "results" / path.name).write_bytes(path.read_bytes())
    assert update() == 0
    for name, (kind, _) in tables.SECTIONS.items():
        assert list(own.glob(f"{kind}_*.jsonl")), kind
        assert rows_of(page(tmp_path, name)), name
    for name in tables.PAGES:
        assert (tmp_path / "results" / name).read_text() == (own / name).read_text()
    assert len(rows_of(page(tmp_path, "provenance"))) >= len(list(own.glob("*.jsonl")))
    measured = json.loads((own / "exports_minilm-l6-sst2_curvature_1thread.jsonl").read_text())
    entry = f"{measured['speed'][0]['ms']['0.5']:.1f} ms"
    assert entry in page(tmp_path, "exports")
