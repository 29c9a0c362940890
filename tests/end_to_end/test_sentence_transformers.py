"""A pruned embedder is one to sentence-transformers, too.

Deleting this lets it be loaded there with another pooling, without its last modules, or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from rfprune import load_pruned
from rfprune.main import main
from rfprune.report.report_json import read_report
from rfprune.tasks.own_data import similarity_task, with_columns
from rfprune.tasks.splits import load_split
from tests.end_to_end.test_tasks import embedder

LIBRARY: Any = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")


@pytest.mark.parametrize("uniform", [False, True])
def test_it_embeds_as_it_was_scored(
    uniform: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", ())
    model, data = embedder(tmp_path / "given")
    flags = ["--model", str(model), "--task", "similarity", "--data-dir", str(data)]
    flags += "--samples 16 --batch-size 4 --output-dir out --no-cache --constraint".split()
    assert main([*flags, *(["0.95", "--uniform"] if uniform else ["0.5"])]) == 0
    loaded = LIBRARY.SentenceTransformer("out", device="cpu", trust_remote_code=not uniform)
    assert loaded.max_seq_length == 10
    pairs = load_split(with_columns(similarity_task(), data, None, None), "validation", data)
    texts = [
        text for pair in zip(pairs["sentence1"], pairs["sentence2"], strict=True) for text in pair
    ]
    embeddings = np.asarray(loaded.encode(texts, batch_size=5))
    cosines = (embeddings[::2] * embeddings[1::2]).sum(1)
    score = 100 * spearmanr(cosines, pairs["score"]).statistic
    report = read_report(tmp_path / "out")
    assert score == pytest.approx(report["scores"]["pruned"]["spearmanr"], abs=1e-6)
    assert abs(score - report["scores"]["original"]["spearmanr"]) > 1e-3, "it has been pruned"
    tokens = loaded.tokenizer(texts[0], truncation=True, max_length=10, return_tensors="pt")
    with torch.no_grad():
        hidden = load_pruned("out")(**tokens).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden[0], dim=0)
    torch.testing.assert_close(torch.from_numpy(embeddings[0]), expected)


@pytest.mark.parametrize("uniform", [False, True])
def test_a_reranker_scores_on_the_scale_of_the_original(
    uniform: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Any,
    tiny_tokenizer: Any,
) -> None:
    """Its activation function is in config_sentence_transformers.json alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", ())
    tiny_model(num_labels=1).save_pretrained("plain")
    tiny_tokenizer().save_pretrained("plain")
    identity = LIBRARY.CrossEncoder("plain", activation_fn=torch.nn.Identity(), device="cpu")
    identity.save_pretrained("given")
    pairs = [("the film", f"a {word} movie") for word in ("good", "bad", "dull", "great")] * 8
    for split in ("train", "validation"):
        rows = [f"{a},{b},{number % 5}" for number, (a, b) in enumerate(pairs)]
        path = tmp_path / "data" / f"{split}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(["sentence1,sentence2,label", *rows]) + "\n")
    flags = "--model given --task custom --data-dir data --samples 16 --batch-size 4".split()
    flags += "--output-dir out --no-cache --skip-tune --constraint".split()
    assert main([*flags, *(["0.95", "--uniform"] if uniform else ["0.5"])]) == 0
    loaded = LIBRARY.CrossEncoder("out", device="cpu", trust_remote_code=not uniform)
    texts = loaded.tokenizer(*map(list, zip(*pairs[:4], strict=True)), return_tensors="pt")
    with torch.no_grad():
        logits = load_pruned("out")(**texts).logits[:, 0]
    np.testing.assert_allclose(loaded.predict(pairs[:4]), logits, atol=1e-5)
    assert not np.allclose(loaded.predict(pairs[:4]), torch.sigmoid(logits), atol=1e-2)
    assert "CrossEncoder(" in (tmp_path / "out" / "README.md").read_text()
