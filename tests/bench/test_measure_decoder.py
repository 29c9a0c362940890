"""`scripts/measure_decoder.py` on a tiny language model, and the tables made of its lines."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import transformers

from scripts import decoder_table, measure_decoder
from tests.conftest import make_tiny_model, make_tiny_tokenizer

WORDS = "the a film was not very good bad and it".split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a model and a text."""
    tokenizer = make_tiny_tokenizer("gpt2")
    model = make_tiny_model("gpt2", "causal-lm", vocab_size=len(tokenizer))
    assert isinstance(model, transformers.PreTrainedModel)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    generator = random.Random(0)
    for split in ("train", "validation"):
        text = " ".join(generator.choices(WORDS, k=400))
        (tmp_path / f"{split}.txt").write_text(text)
    return tmp_path


def test_lines_hold_perplexity_and_what_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RFPRUNE_CACHE", str(folder / "cache"))
    output = folder / "decoder_tiny.jsonl"
    flags = (
        f"--model {folder / 'model'} --data-dir {folder} --output {output} --device cpu "
        "--constraint 0.7 --samples 8 --max-length 12 --eval-limit 4 "
        "--variant curvature magnitude-l2-select --prompt film"
    ).split()
    assert measure_decoder.main(flags) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["variant"] for line in lines] == ["curvature", "magnitude-l2-select"]
    for line in lines:
        assert line["metric_name"] == "perplexity"
        assert line["score"] != line["original_score"]
        assert line["evaluated_examples"] == 4
        assert line["written"].keys() == line["written_by_original"].keys() == {"film"}
        assert line["divergence"] > 0
        assert line["peak_memory_bytes"] > 1e7
    content = output.read_text()
    assert measure_decoder.main(flags) == 0  # nothing is measured twice
    assert output.read_text() == content
    readme = folder / "README.md"
    readme.write_text(f"before\n{decoder_table.BEGIN}\n{decoder_table.END}\nafter\n")
    places = ["--results", str(folder), "--readme", str(readme)]
    assert decoder_table.main([*places, "--check"]) == 1
    assert decoder_table.main(places) == 0
    assert decoder_table.main([*places, "--check"]) == 0
    apart = f"{lines[0]['divergence']:.3f}"
    assert f"| curvature | {lines[0]['score']:.1f} ({apart}) |" in readme.read_text()
    full = (folder / "decoders.md").read_text()
    assert "original" in full
    assert "*film*" in full
    assert f" | {apart} | " in full
    without = [{**line, "divergence": None} for line in lines]  # as it was once measured
    output.write_text("".join(json.dumps(line) + "\n" for line in without))
    assert decoder_table.main(places) == 0
    assert f"| curvature | {lines[0]['score']:.1f} |" in readme.read_text()
