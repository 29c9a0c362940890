"""`scripts/plot_results.py` and `scripts/diagnose_search.py` on tiny inputs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
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
