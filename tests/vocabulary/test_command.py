"""--vocabulary: alone and together with pruning, in the command's own numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rfprune import load_pruned
from rfprune.cost.constraint import Constraint
from rfprune.main import main
from rfprune.methods.budget import cost_model
from rfprune.methods.problem import prepare_problem
from rfprune.settings import Settings
from rfprune.vocabulary.texts import count_tokens_of_files
from tests.conftest import WORDS, TinyFolder, make_tiny_model, make_tiny_tokenizer

Run = Callable[..., dict[str, Any]]


def with_unused_pieces(tokenizer: Any) -> Any:
    """Forty pieces more, between those that texts use."""
    file = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = [f"unused{number}" for number in range(40)]
    first, *others = file["model"]["vocab"]
    file["model"]["vocab"] = {
        piece: number for number, piece in enumerate([first, *others[:100], *pieces, *others[100:]])
    }
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(file))
    return tokenizer


@pytest.fixture
def run(tiny_data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(*flags, model=..., task="mrpc", text="...")`: the report of a run with --vocabulary."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", ())
    monkeypatch.setattr("rfprune.cli.run.below_baseline", lambda *_: None)
    monkeypatch.setenv("RFPRUNE_CACHE", str(tmp_path / "cache"))

    folder = tmp_path / "model"
    tokenizer = with_unused_pieces(make_tiny_tokenizer())
    tokenizer.save_pretrained(folder)
    make_tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)

    def make(
        *flags: str,
        model: Path = folder,
        task: str = "mrpc",
        data_dir: Path = tiny_data_dir,
        text: str = " ".join(WORDS),
    ) -> dict[str, Any]:
        Path("texts.txt").write_text(text + "\n", encoding="utf-8")
        given = ["--model", str(model), "--task", task, "--quiet"]
        given += ["--data-dir", str(data_dir), "--samples", "16", "--batch-size", "8"]
        given += ["--vocabulary", "texts.txt", "--output-dir", "out", *flags]
        assert main(given) == 0
        report: dict[str, Any] = json.loads(Path("out/report.json").read_text(encoding="utf-8"))
        return report

    return make


def test_alone_it_changes_nothing_but_the_number_of_tokens(run: Run) -> None:
    report = run()
    tokens = report["vocabulary"]
    assert tokens["pruned"] < tokens["original"]
    assert tokens["held_out"]["changed_texts"] == 0
    assert report["scores"]["pruned"] == report["scores"]["original"]
    assert report["divergence"] == 0
    assert report["pruned"]["macs"] == report["original"]["macs"]
    assert report["pruned"]["params"] < report["original"]["params"]
    assert report["constraint"] is None
    assert report["warnings"] == []
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert "0 of 24 validation texts" in card or "0 of 48 validation texts" in card
    old, new = Path("model"), Path("out")
    both = [
        AutoModelForSequenceClassification.from_pretrained(folder)
        .eval()(**AutoTokenizer.from_pretrained(folder)("the good film", return_tensors="pt"))
        .logits
        for folder in (old, new)
    ]
    assert torch.equal(*both)
    assert load_pruned("out").config.vocab_size == tokens["pruned"]


def test_constraints_refer_to_the_model_with_all_its_tokens(run: Run) -> None:
    report = run("--constraint", "0.85", "--metric", "params")
    assert report["achieved"]["params"] <= 0.85
    assert report["pruned"]["params"] > 0.8 * report["original"]["params"]
    assert report["vocabulary"]["pruned"] < report["vocabulary"]["original"]


def test_trimmed_tokens_count_towards_a_constraint(tiny_model: Any, tiny_batch: Any) -> None:
    from dataclasses import replace

    small = tiny_model("bert")
    large = tiny_model("bert", vocab_size=2 * small.config.vocab_size)
    problem = prepare_problem(small, [tiny_batch()], Settings(method="kwon"))
    counted = replace(problem, untrimmed=large)
    for metric in ("params", "memory"):
        alone, together = cost_model(problem, metric), cost_model(counted, metric)
        assert together.original > alone.original
        assert together.total([b.num_units for b in problem.layout.blocks]) == alone.original
        constraint = Constraint(metric, 0.95)
        saved = together.original - alone.original
        assert together.budget(constraint) == pytest.approx(alone.budget(constraint) + 0.95 * saved)
    assert cost_model(counted, "mac").original == cost_model(problem, "mac").original


def test_too_small_a_corpus_is_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(text="a few words")
    assert report["vocabulary"]["held_out"]["changed_texts"] > 0
    assert any("more tokens of the validation texts" in one for one in report["warnings"])


def test_perplexities_are_per_token_of_the_original(
    run: Run, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Else a tokenizer that makes twice the tokens of a text would halve its nats per token."""
    data = tmp_path / "text"
    data.mkdir()
    for split, words in (("train", WORDS[:10]), ("validation", WORDS)):
        text = "\n".join(" ".join(words) for _ in range(60))
        (data / f"{split}.txt").write_text(text, encoding="utf-8")
    report = run(
        "--max-length=16",
        model=tiny_folder("gpt2", "causal-lm"),
        task="language-modeling",
        data_dir=data,
        text="a few words",
    )
    held_out = report["vocabulary"]["held_out"]
    assert held_out["tokens_after"] > 1.5 * held_out["tokens_before"]
    assert report["divergence"] is None
    tokens = report["vocabulary"]["pruned"]
    assert report["scores"]["pruned"]["perplexity"] > tokens, "several tokens for one"
    assert set(report["continuations"]) == {"prompt", "original", "pruned"}


def test_texts_come_from_plain_files_and_tables(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from tests.conftest import write_parquet

    tokenizer = tiny_tokenizer()
    plain, table = tmp_path / "plain.md", tmp_path / "table.parquet"
    plain.write_bytes(b"\xef\xbb\xbfgood film\r\ngood plot\n")
    write_parquet(table, [{"one": "dull film", "two": None}])
    counts = count_tokens_of_files(tokenizer, [plain, table]).counts
    found = {tokenizer.convert_ids_to_tokens(int(i)): int(counts[i]) for i in counts.nonzero()[0]}
    assert found == {"good": 2, "film": 2, "plot": 1, "dull": 1}
