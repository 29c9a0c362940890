"""The backends onnx and openvino of sentence-transformers load the exports of an output folder.

Without these tests they could find no file, and silently export the original architecture anew.
The backends need optimum, which has no release for this version of transformers: `make
test-backends` runs them in an environment with transformers 4.57. Without it the files are found by
sentence-transformers' own search, and run in its modules by their runtimes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from rfprune.cli.validation import EXPORT_PACKAGES
from rfprune.export.onnx import OnnxModel
from rfprune.export.openvino import OpenvinoModel
from rfprune.main import main
from rfprune.report.report_json import read_report
from rfprune.tasks.own_data import similarity_task, with_columns
from rfprune.tasks.splits import load_split
from tests.conftest import make_tiny_model, make_tiny_tokenizer
from tests.end_to_end.test_tasks import embedder

LIBRARY: Any = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
needs_packages = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, (*EXPORT_PACKAGES["openvino"], "onnxruntime", "nncf"))),
    reason="needs the extras rfprune[onnx,openvino]",
)

FILES = (
    ("onnx", "model.onnx", "onnx"),
    ("onnx", "model_quantized.onnx", "onnx_int8"),
    ("openvino", "openvino_model.xml", "openvino"),
    ("openvino", "openvino_model_quantized.xml", "openvino_int8"),
)
"""Backend, file, and the name of the export in the report."""


OPTIMUM_PYTHON = os.environ.get("RFPRUNE_OPTIMUM_PYTHON")
"""An interpreter with optimum and sentence-transformers."""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the outputs `embedder` and `reranker`, both with all exports."""
    folder = tmp_path_factory.mktemp("backends")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
        patch.setattr("rfprune.report.plots.RUN_FIGURES", ())
        given, data = embedder(folder / "given")
        pooling = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True}
        pooling["pooling_mode_mean_tokens"] = False
        (given / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        run = "--samples 16 --batch-size 4 --no-cache --skip-tune --constraint 0.5 --quantize"
        more = f"{run} --export dense onnx openvino".split()
        task = ["--model", str(given), "--task", "similarity", "--data-dir", str(data)]
        assert main([*task, *more, "--output-dir", "embedder"]) == 0
        make_tiny_model(num_labels=1).save_pretrained("cross")
        make_tiny_tokenizer().save_pretrained("cross")
        task = f"--model cross --task custom --data-dir {data} --label-column score".split()
        assert main([*task, *more, "--output-dir", "reranker"]) == 0
    return folder


def pairs(folder: Path) -> tuple[list[tuple[str, str]], Sequence[float]]:
    """The texts that were scored, and their similarities."""
    data = folder / "given" / "data"
    rows = load_split(with_columns(similarity_task(), data, None, None), "validation", data)
    return list(zip(rows["sentence1"], rows["sentence2"], strict=True)), rows["score"]


def score_of(model: Any, folder: Path) -> float:
    """Spearman correlation of the cosines with the similarities, in points."""
    texts, similarities = pairs(folder)
    flat = [text for pair in texts for text in pair]
    embeddings = np.asarray(model.encode(flat, batch_size=5))
    return float(
        100 * spearmanr((embeddings[::2] * embeddings[1::2]).sum(1), similarities).statistic
    )


def reranked_score_of(model: Any, folder: Path) -> float:
    """Spearman correlation of the predictions with the similarities, in points."""
    texts, similarities = pairs(folder)
    return float(100 * spearmanr(model.predict(texts, batch_size=4), similarities).statistic)


def scores(report: Any) -> dict[str, float]:
    return {name: entry["score"] for name, entry in report["exports"].items() if "score" in entry}


@needs_packages
@pytest.mark.parametrize(("backend", "file", "name"), FILES)
def test_the_backend_finds_the_files_and_scores_as_reported(
    backend: str, file: str, name: str, outputs: Path
) -> None:
    utils = pytest.importorskip("sentence_transformers.backend.utils")
    folder, wanted = outputs / "embedder", FILES[2 * (backend == "openvino")][1]
    given = {} if file == wanted else {"file_name": file}
    pattern = {"onnx": "*.onnx", "openvino": "openvino*.xml"}[backend]
    shown = {"onnx": "ONNX", "openvino": "OpenVINO"}[backend]
    export, found = utils.backend_should_export(folder, True, given, wanted, pattern, shown)
    assert (export, found["subfolder"], found["file_name"]) == (False, backend, file)
    runtime = (OnnxModel if backend == "onnx" else OpenvinoModel)(folder / backend / file)
    loaded = LIBRARY.SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    transformer = loaded[0].auto_model
    transformer.forward = lambda **inputs: runtime(
        **{key: value for key, value in inputs.items() if key in runtime.input_names}
    )
    report = read_report(folder)
    assert score_of(loaded, outputs) == pytest.approx(scores(report)[name], abs=1e-4)
    assert len({round(value, 6) for value in scores(report).values()}) > 1, "they can be told apart"


@needs_packages
def test_any_classifier_with_one_label_is_a_reranker(outputs: Path) -> None:
    """Older cross-encoders bring no settings of sentence-transformers."""
    loaded = LIBRARY.CrossEncoder(str(outputs / "reranker"), device="cpu", trust_remote_code=True)
    report = read_report(outputs / "reranker")
    assert reranked_score_of(loaded, outputs) == pytest.approx(report["pruned"]["score"], abs=1e-4)
    assert report["pruned"]["score"] != pytest.approx(report["original"]["score"], abs=1e-3)


@needs_packages
@pytest.mark.skipif(OPTIMUM_PYTHON is None, reason="needs an environment: make test-backends")
def test_the_backends_themselves_score_as_reported(outputs: Path) -> None:
    """They run no code from the folder: neither needs trust_remote_code."""
    texts, similarities = pairs(outputs)
    done = subprocess.run(
        [str(OPTIMUM_PYTHON), str(Path(__file__).with_name("backend_outputs.py")), str(outputs)],
        input=json.dumps(texts),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for _, file, name in FILES:
        for kind in ("embedder", "reranker"):
            score = 100 * spearmanr(found[file][kind], similarities).statistic
            reported = scores(read_report(outputs / kind))[name]
            # quantised activations have one scale a batch, and the batches differ
            tolerance = 10.0 if name.endswith("int8") else 1e-4
            assert score == pytest.approx(reported, abs=tolerance), (file, kind)
