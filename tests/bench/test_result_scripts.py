"""`scripts/plot_results.py` and `scripts/diagnose_search.py` on tiny inputs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
HEADER = (
    "model,task,metric,variant,constraint,metric_name,original_score,score_mean,score_min,"
    "score_max,divergence_mean,divergence_min,divergence_max\n"
)


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_picture_is_drawn_from_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = script("plot_results").main
    assert plot(["--results", str(tmp_path)]) == 2
    assert "run scripts/summarise.py first" in capsys.readouterr().err
    summary = tmp_path / "summary.csv"
    summary.write_text(HEADER + "m,sst2,params,curvature,0.5,accuracy,90,89,88,90,.1,.1,.2\n")
    assert plot(["--results", str(tmp_path)]) == 2
    assert not (tmp_path / "summary.png").exists()
    rows = [
        f"m,sst2,mac,{variant},{kept},accuracy,90,{score},{score - 1},{score + 1},.1,.05,.2\n"
        for variant in ("curvature", "kwon-scheduled", "kwon-search")
        for kept, score in ((0.5, 88), (0.3, 85))
    ]
    summary.write_text(HEADER + "".join(rows))
    assert plot(["--results", str(tmp_path)]) == 0
    first = (tmp_path / "summary.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    summary.write_text(HEADER + "".join(rows[:2]))
    assert plot(["--results", str(tmp_path)]) == 0
    assert (tmp_path / "summary.png").read_bytes() != first


def test_the_diagnosis_names_every_block(
    tmp_path: Path,
    tiny_folder: Callable[..., Path],
    tiny_data_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "search.json"
    flags = f"--model {tiny_folder()} --task mrpc --data-dir {tiny_data_dir} --samples 16"
    assert script("diagnose_search").main([*flags.split(), "--output", str(output)]) == 0
    result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    assert [block["block"] for block in result["blocks"]] == [
        f"layer.{layer}.{kind}" for layer in (0, 1) for kind in ("heads", "neurons")
    ]
    assert 0 < sum(block["kept"] for block in result["blocks"]) < 32
    assert result["one_by_one"] > 0
    assert result["one_by_one"] != result["blocks_together"] != result["all_together"]
    assert "layer.1.neurons" in capsys.readouterr().out
    unknown = [*flags.replace("mrpc", "mpc").split(), "--output", str(tmp_path / "no.json")]
    assert script("diagnose_search").main(unknown) == 2
    assert not (tmp_path / "no.json").exists()


def test_peers_stand_beside_our_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers = script("peers_table")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{peers.BEGIN}\nold\n{peers.END}\nafter\n")
    results = SCRIPTS.parent / "results"
    flags = ["--results", str(results), "--readme", str(readme)]
    assert peers.main([*flags, "--check"]) == 1
    assert peers.main(flags) == 0
    assert peers.main([*flags, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| mrpc | K-prune 2024 | BERT-base |  |  |  | 88.3 | 86.9 | 85.6 | 84.9 |" in text
    own = [
        json.loads(line)
        for path in results.glob("quality_*_sst2_mac_2048samples.jsonl")
        for line in path.read_text().splitlines()
    ]
    half = [x for x in own if x["variant"] == "curvature" and x["constraint"] == 0.5]
    mean = sum(x["score"] for x in half) / len(half)
    row = next(
        line
        for line in text.splitlines()
        if line.startswith("| sst2 | rfprune, curvature | minilm-l6-sst2")
    )
    assert row.split("|")[7].strip() == f"{mean:.1f}"
    readme.write_text("no markers\n")
    assert peers.main(flags) == 2
    assert "peers:begin" in capsys.readouterr().err


def test_studies_become_a_table_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    studies = script("studies_table")
    assert studies.main(["--results", str(tmp_path)]) == 2
    assert "run scripts/sweep.py" in capsys.readouterr().err
    measured = next((SCRIPTS.parent / "results").glob("quality_*_sst2_mac_2048samples.jsonl"))
    line = json.loads(measured.read_text().splitlines()[0])
    line |= {"variant": "curvature", "constraint": 0.3, "score": 88.0, "divergence": 0.04}
    file = tmp_path / "study_samples_m_sst2_mac.jsonl"
    lines = [line | {"requested_samples": n, "score": 80.0 + n / 100} for n in (512, 64)]
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert studies.main(["--results", str(tmp_path), "--check"]) == 1
    assert studies.main(["--results", str(tmp_path)]) == 0
    assert studies.main(["--results", str(tmp_path), "--check"]) == 0
    rows = [row for row in (tmp_path / "studies.md").read_text().splitlines() if "curv" in row]
    assert [row.split(" | ")[0] for row in rows] == ["| 64", "| 512"]
    assert "80.6 / 0.040" in rows[0]
    file.write_text("[]\n")
    assert studies.main(["--results", str(tmp_path)]) == 2


def test_variations_stand_beside_the_plain_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explored = script("exploration_table")
    assert explored.main(["--results", str(tmp_path)]) == 2
    assert "run scripts/explore.py" in capsys.readouterr().err
    shared = {"task": "sst2", "requested_samples": 64, "constraint": 0.3, "score": 88.0}
    lines = [
        shared | {"variation": name, "seed": seed, "divergence": divergence}
        for name, seed, divergence in [
            *(("plain", 0, 0.04), ("plain", 1, 0.06)),
            *(("swaps", 0, 0.05), ("weights", 0, 0.06), ("weights", 1, 0.06)),
        ]
    ]
    file = tmp_path / "exploration_m_sst2_64samples.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert explored.main(["--results", str(tmp_path), "--check"]) == 1
    assert explored.main(["--results", str(tmp_path)]) == 0
    assert explored.main(["--results", str(tmp_path), "--check"]) == 0
    text = (tmp_path / "exploration.md").read_text()
    assert "| `swaps` | 0.0500, +25%, 88.0 |" in text
    assert "| `weights` | 0.0600, +20%, 88.0 (2 seeds) |" in text
    file.write_text("{}\n")
    assert explored.main(["--results", str(tmp_path)]) == 2


def test_sizes_stand_beside_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale = script("scale_table")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{scale.BEGIN}\nold\n{scale.END}\nafter\n")
    flags = ["--results", str(tmp_path), "--readme", str(readme)]
    assert scale.main(flags) == 2
    assert "run scripts/benchmark_scale.py first" in capsys.readouterr().err
    committed = SCRIPTS.parent / "results" / "scale_llama_cpu_float32.jsonl"
    line = json.loads(committed.read_text().splitlines()[0])
    line["peak_bytes"] = dict.fromkeys(line["peak_bytes"], 10**9) | {"tune": 2 * 10**9}
    line |= {"weight_bytes": 5 * 10**8, "params": 125_000_000}
    (tmp_path / "scale_llama_cpu_float32.jsonl").write_text(json.dumps(line) + "\n")
    assert scale.main([*flags, "--check"]) == 1
    assert scale.main(flags) == 0
    assert scale.main([*flags, "--check"]) == 0
    row = readme.read_text().splitlines()[-4]
    assert "| 125 M | 0.50 GB |" in row
    assert row.endswith("| 2.0 GB, 4.0 x weights |")


def test_what_may_be_lost_stands_in_order(tmp_path: Path) -> None:
    drops = script("max_drop_table")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{drops.BEGIN}\n{drops.END}\nafter\n")
    committed = next((SCRIPTS.parent / "results").glob("max_drop_*_sst2_*.jsonl"))
    line = json.loads(committed.read_text().splitlines()[0])
    line |= {"model": "m", "drop": 0.25, "standard_error": 0.5, "seconds": 30, "single_seconds": 12}
    lines = [line | {"points": points} for points in (2.0, 0.5)]
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (tmp_path / "max_drop_m_sst2_mac_64samples.jsonl").write_text(text)
    flags = ["--results", str(tmp_path), "--readme", str(readme)]
    assert drops.main([*flags, "--check"]) == 1
    assert drops.main(flags) == 0
    assert drops.main([*flags, "--check"]) == 0
    first, second = readme.read_text().splitlines()[-5:-3]
    assert "| 0.5 |" in first
    assert "| 2 |" in second
    assert "| 0.25 (0.50) |" in first
    assert first.endswith("| 2.5 |")
