"""Every tool and measurement answers a mistake with one sentence and writes nothing.

Deleting this lets a typing mistake end in a traceback, or after an hour of measuring.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

from tests.conftest import TinyFolder

DATA = "--model {model} --task mrpc --data-dir {data}"
SHAPE = "--model {model} --device cpu --seconds 0"
GOOD_FLAGS = {
    "evaluate": f"{DATA} --output scores.json",
    "profile_latency": f"{SHAPE} --batch-size 2 --sequence-length 5 --output table.json",
    "finetune": "--model {encoder} --task sst2 --data-dir {data} --output-dir new --batch-size 8",
    "push_to_hub": "",
    "bench.speedup": f"{SHAPE} --output a.jsonl --runtime eager --cells 1x5",
    "bench.quality": f"{DATA} --output a.jsonl --device cpu --constraint 0.5 --samples 16",
}
SHOW_PROGRESS = ("finetune", "bench.speedup", "bench.quality")

CASES = [
    ("evaluate", "--task mprc", "Unknown task 'mprc'"),
    ("evaluate", "--model missing/folder/here", "'missing/folder/here' does not exist"),
    ("evaluate", "--data-dir missing", "data folder 'missing' does not exist"),
    ("evaluate", "--batch-size 0", "--batch-size 0"),
    ("evaluate", "--limit -3", "limit of -3"),
    ("evaluate", "--seed -3", "seed of -3"),
    ("evaluate", "--max-length 9999", "9999"),
    ("evaluate", "--output missing/scores.json", "does not exist; create it"),
    ("evaluate", "--output .", "already exists"),
    ("profile_latency", "--batch-size 0", "--batch-size 0: give 1 or more"),
    ("profile_latency", "--sequence-length -1", "--sequence-length -1: give 1 or more"),
    ("profile_latency", "--round-to 0", "--round-to 0: give 1 or more"),
    ("profile_latency", "--sequence-length 600", "--sequence-length 600 exceeds the 514 positions"),
    ("profile_latency", "--model missing/folder", "missing/folder"),
    ("profile_latency", "--model .", "config.json"),
    ("profile_latency", "--output missing/file.json", "does not exist; create it"),
    ("profile_latency", "--output .", "already exists"),
    ("profile_latency", "--device cuda:99", "--device cuda:99"),
    ("profile_latency", "--model damaged", "cannot be loaded"),
    ("finetune", "--task mprc", "Unknown task"),
    ("finetune", "--model /no/such/encoder", "cannot be loaded"),
    ("finetune", "--data-dir /no/such/data", "does not exist"),
    ("finetune", "--epochs 0", "--epochs 0.0"),
    ("finetune", "--epochs nan", "--epochs nan"),
    ("finetune", "--batch-size -1", "--batch-size -1"),
    ("finetune", "--max-train-samples 0", "--max-train-samples 0"),
    ("finetune", "--max-length 2", "--max-length 2 "),
    ("finetune", "--label-column label", "belongs to --task custom"),
    ("finetune", "--task custom", "no train split of custom"),
    ("finetune", "--output-dir .", "already exists"),
    ("push_to_hub", "nowhere someone/small", "There is no folder 'nowhere'"),
    ("push_to_hub", ". someone/small", "not the output of a run"),
    ("push_to_hub", ". ../someone", "is not a valid name of a repository"),
    ("bench.speedup", "--turns missing/file", "--turns missing/file"),
    ("bench.speedup", "--cells 32by128", "32by128 is not a shape"),
    ("bench.speedup", "--cells 0x5", "--cells 0x5"),
    ("bench.speedup", "--cells 1x900", "--length 900"),
    ("bench.speedup", "--constraint 1.5", "1.5"),
    ("bench.speedup", "--round-to 0", "--round-to 0"),
    ("bench.speedup", "--seconds nan", "--seconds nan"),
    ("bench.speedup", "--runtime compile-graphs", "--device cpu"),
    ("bench.speedup", "--model missing/folder", "missing/folder"),
    ("bench.speedup", "--runtime compile --profile", "leave --runtime out"),
    ("bench.speedup", "--runtime onnx --dtype bfloat16", "float32"),
    ("bench.quality", "--task mrcp", "mrcp"),
    ("bench.quality", "--model no/such/folder", "no/such/folder"),
    ("bench.quality", "--output scores.json", ".jsonl"),
    ("bench.quality", "--constraint 1", "--constraint 1"),
]


@pytest.mark.parametrize(("tool", "changes", "words"), CASES)
def test_a_user_error_is_one_line_and_nothing_is_written(
    tool: str,
    changes: str,
    words: str,
    tiny_folder: TinyFolder,
    tiny_data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "onnx" in changes and importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("needs the extra rfprune[onnx]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RFPRUNE_CACHE", str(tmp_path.parent / "cache"))
    model, encoder = tiny_folder(), tiny_folder("bert", "none")
    Path("damaged").mkdir()
    Path("damaged/config.json").write_bytes((model / "config.json").read_bytes())
    Path("damaged/model.safetensors").write_bytes(b"short")
    before = contents()
    capsys.readouterr()
    good = GOOD_FLAGS[tool].format(model=model, encoder=encoder, data=tiny_data_dir)
    assert importlib.import_module(f"scripts.{tool}").main(f"{good} {changes}".split()) == 2
    printed = capsys.readouterr()
    *progress, message = printed.err.splitlines()
    assert message.startswith(f"{tool.removeprefix('bench.')}: error: ")
    assert words in message
    assert not progress or tool in SHOW_PROGRESS
    assert not any("error: " in line for line in progress)
    assert printed.out == ""
    assert contents() == before


def contents() -> dict[Path, bytes]:
    """Every file that has something in it."""
    files = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    return {path: content for path, content in files.items() if content}
