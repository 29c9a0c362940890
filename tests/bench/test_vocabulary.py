"""The measurement of trimmed vocabularies, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.bench import score_tables, vocabulary


def test_a_line_holds_sizes_and_pieces_of_held_out_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "PIECES", 400)
    texts, held_out = tmp_path / "texts.txt", tmp_path / "held_out.txt"
    texts.write_text("the cat sat on the mat\na dog ran\n", encoding="utf-8")
    held_out.write_text("the cat ran\nsome other words\n", encoding="utf-8")
    output = tmp_path / "vocabulary_unigram.jsonl"
    flags = ["--model", "unigram", "--texts", str(texts), "--held-out", str(held_out)]
    assert vocabulary.main([*flags, "--output", str(output)]) == 0
    (line,) = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert line["tokens"][0] == 402
    assert line["tokens"][1] < 200
    assert line["difference"] == 0
    assert line["held_out"]["texts"] == 2
    assert "hidden states differ by 0" in score_tables.vocabulary([line])
