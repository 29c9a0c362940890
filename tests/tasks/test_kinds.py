"""Choices, several labels at once and pairs of texts: rows, scores and divergences.

Without these a choice could be read with another question, or an embedding be compared with itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from rfprune.checkpoints.loading import resolve_model
from rfprune.errors import UserError
from rfprune.tasks.batching import make_batches
from rfprune.tasks.divergence import divergence_of_logits
from rfprune.tasks.encoding import encode
from rfprune.tasks.evaluation_set import prepare_evaluation
from rfprune.tasks.metrics import f1_labels, f1_micro
from rfprune.tasks.multiple_choice import choice_columns
from rfprune.tasks.own_data import custom_task, similarity_task, with_columns
from rfprune.tasks.similarity import cosines
from tests.conftest import make_tiny_tokenizer

SWAG = {
    "sent1": "the film was good .", "sent2": "the plot",
    "ending0": "was slow", "ending1": "won", "ending2": "closed", "label": 1,
}  # fmt: skip


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def choice_task() -> Any:
    return custom_task(None, None, "here", "multiple-choice")


def test_choices_are_rows_of_an_example(tmp_path: Path) -> None:
    task = with_columns(choice_task(), write(tmp_path, SWAG, SWAG | {"label": 2}), None, None)
    tokenizer = make_tiny_tokenizer()
    data = prepare_evaluation(task, tokenizer, tmp_path)
    (batch,) = data.batches
    assert batch["input_ids"].shape[:2] == (2, 3)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in batch["input_ids"][0]]
    assert texts[0] == "the film was good. the plot was slow".replace(".", " .")
    assert texts[2].endswith("the plot closed")
    assert data.labels is not None and data.labels.tolist() == [1, 2]
    assert int(batch["token_type_ids"][0, 0].sum()) == 5  # the second part, and what ends it
    listed = {"question": "who won ?", "choices": ["red", "the old team"], "label": 0}
    asked = with_columns(choice_task(), write(tmp_path, listed, listed), None, None)
    assert asked.text_columns == ("question", "choices")
    (batch,) = prepare_evaluation(asked, tokenizer, tmp_path).batches
    assert batch["input_ids"].shape[:2] == (2, 2)


def test_columns_of_choices_are_in_the_order_of_their_numbers() -> None:
    names = ["choice10", "label", "choice2", "choice1", "sent1"]
    assert choice_columns(names) == ("choice1", "choice2", "choice10")
    assert choice_columns(["ending0"]) == () == choice_columns(["text"])


NAMES = ("good", "bad", "long")
SEVERAL = custom_task(
    transformers.BertConfig(id2label=dict(enumerate(NAMES))),
    "multi_label_classification",
    "here",
)


@pytest.mark.parametrize(
    "row",
    [
        {"labels": ["Long", "good"]},
        {"labels": [0, 2]},
        {"labels": [1, 0, 1]},
        {"good": "1", "bad": "0", "long": "True"},
    ],
    ids=str,
)
def test_several_labels_however_they_are_written(row: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, {"text": "a film", **row}, {"text": "the plot", **row})
    task = with_columns(SEVERAL, tmp_path, None, None)
    data = prepare_evaluation(task, make_tiny_tokenizer(), tmp_path)
    assert data.labels is not None and data.labels.tolist() == [[1.0, 0.0, 1.0]] * 2


def test_f1_of_several_labels() -> None:
    from sklearn.metrics import f1_score

    found, wanted = (np.random.default_rng(seed).integers(0, 2, (20, 3)) for seed in (0, 1))
    assert f1_micro(found, wanted) == pytest.approx(f1_score(wanted, found, average="micro"))
    assert f1_labels(found, wanted) == pytest.approx(f1_score(wanted, found, average="macro"))
    assert f1_micro(found, wanted) != f1_labels(found, wanted)


def test_divergence_of_several_labels_is_a_sum_over_them() -> None:
    left, right = (np.random.default_rng(s).normal(size=(5, 3)).astype(np.float32) for s in (0, 1))
    p, q = (1 / (1 + np.exp(-values.astype(np.float64))) for values in (left, right))
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(1).mean()
    assert divergence_of_logits((left,), (right,), "multi-label") == pytest.approx(expected)
    squares = ((left - right) ** 2).sum(1).mean() / 2
    assert divergence_of_logits((left,), (right,), "similarity") == pytest.approx(squares)
    assert divergence_of_logits((left,), (left,), "multi-label") == 0


def test_pairs_are_two_rows_and_one_cosine(tmp_path: Path) -> None:
    rows = [{"sentence1": "a film", "sentence2": "the plot of it", "score": s} for s in (0.1, 0.7)]
    task = with_columns(similarity_task(), write(tmp_path, *rows), None, None)
    assert task.label_column == "score"
    tokenizer = make_tiny_tokenizer()
    data = prepare_evaluation(task, tokenizer, tmp_path, batch_size=8)
    assert data.num_examples == 2 and data.labels is not None and data.labels.tolist() == [0.1, 0.7]
    assert sorted(np.concatenate(data.rows)) == [0, 1, 2, 3]
    from datasets import Dataset

    encoded = encode(task, tokenizer, Dataset.from_list(rows))
    assert len(encoded) == 4
    assert len(encoded[0]["input_ids"]) < len(encoded[1]["input_ids"])
    assert make_batches(encoded, tokenizer, 4)[0]["input_ids"].shape[0] == 4
    embeddings = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], dtype=np.float32)
    assert cosines(embeddings).tolist() == [0, 1]
    with pytest.raises(UserError, match="compares two texts"):
        with_columns(similarity_task(), tmp_path, ["sentence1"], None)


def test_the_model_may_be_in_a_folder_of_its_own(tmp_path: Path) -> None:
    modules = [{"type": "x", "path": "0_Transformer"}, {"type": "y", "path": "1_P"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert resolve_model(str(tmp_path), similarity_task()) == str(tmp_path / "0_Transformer")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path), similarity_task()) == str(tmp_path)
