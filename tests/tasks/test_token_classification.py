"""Words to tokens and back, and entity scores equal to seqeval's.

Without these labels could slide to other words, or half an entity count as one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rfprune.errors import UserError
from rfprune.tasks.batching import make_batches
from rfprune.tasks.columns import checked_columns
from rfprune.tasks.encoding import encode
from rfprune.tasks.entity_scores import entity_scores, entity_spans, names_entities
from rfprune.tasks.files import Table
from rfprune.tasks.inference import token_logits
from rfprune.tasks.metrics import compute_scores
from rfprune.tasks.own_data import custom_task
from tests.conftest import make_tiny_model, make_tiny_tokenizer

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "E-LOC", "S-PER")
CONFIG = transformers.BertConfig(id2label=dict(enumerate(NAMES[:5])))


def task_of(*names: str) -> Any:
    config = transformers.BertConfig(id2label=dict(enumerate(names)))
    made = custom_task(config, None, "here", "token-classification")
    return type(made)(**{**vars(made), "text_columns": ("tokens",), "label_column": "tags"})


def test_entities() -> None:
    row = ["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER"]
    loc, per = ((0, 3, 3, "LOC"), (0, 4, 4, "LOC")), (0, 5, 5, "PER")
    assert entity_spans([row]) == {(0, 0, 1, "PER"), *loc, per}
    assert entity_spans([row[:1], row[1:]]) == {
        *((0, 0, 0, "PER"), (1, 0, 0, "PER"), (1, 2, 2, "LOC"), (1, 3, 3, "LOC"), (1, 4, 4, "PER"))
    }
    assert entity_spans([["S-PER", "I-PER"], ["E-LOC", "I-LOC"]]) == {
        *((0, 0, 0, "PER"), (0, 1, 1, "PER"), (1, 0, 0, "LOC"), (1, 1, 1, "LOC"))
    }
    assert not entity_spans([["O", "O"], []])


def test_entity_scores_are_those_of_seqeval() -> None:
    """The figures are seqeval 1.2.2's, for forty rows of random tags."""
    generator = np.random.default_rng(0)
    wanted = generator.integers(0, 7, (40, 8))
    found = np.where(generator.random((40, 8)) < 0.7, wanted, generator.integers(0, 7, (40, 8)))
    rows = [[[NAMES[label] for label in row] for row in labels] for labels in (found, wanted)]
    assert entity_scores(*rows) == pytest.approx(
        {"f1": 0.7196652719665271, "precision": 0.7381974248927039, "recall": 0.7020408163265306}
    )
    nothing = dict.fromkeys(("f1", "precision", "recall"), 0.0)
    assert entity_scores([["O"]], [["O"]]) == nothing == entity_scores([["O"]], [["B-PER"]])


def test_labels_that_name_no_entities_have_an_accuracy_alone() -> None:
    assert names_entities(NAMES)
    assert not names_entities(("O",)) and not names_entities(("NOUN", "B-PER"))
    tagger, entities = task_of("NOUN", "VERB"), task_of(*NAMES)
    found, wanted = [["NOUN", "VERB", "VERB"]], [["NOUN", "VERB", "NOUN"]]
    assert compute_scores(tagger, found, wanted) == {"accuracy": pytest.approx(200 / 3)}
    assert tagger.metric_name == "accuracy" and entities.metric_name == "f1"
    assert list(compute_scores(entities, found, wanted)) == [
        "f1",
        "precision",
        "recall",
        "accuracy",
    ]


def test_the_first_token_of_a_word_has_its_label() -> None:
    from datasets import Dataset

    tokenizer, task = make_tiny_tokenizer(), task_of(*NAMES)
    data = Dataset.from_dict(
        {"tokens": [["the", "zebra", "film"], ["was"]], "tags": [[1, 2, 3], [4]]}
    )
    encoded = encode(task, tokenizer, data)
    pieces = tokenizer.convert_ids_to_tokens(encoded[0]["input_ids"])
    labels = encoded[0]["token_labels"]
    named = {piece: label for piece, label in zip(pieces, labels, strict=True) if label != -100}
    assert list(named.values()) == [1, 2, 3] and list(named) == ["the", "z", "film"]
    (batch,) = make_batches(encoded, tokenizer, 2, with_labels=True)
    assert batch["labels"].shape == batch["input_ids"].shape
    assert batch["labels"][1].tolist().count(-100) == len(labels) - 1
    cut = encode(task, tokenizer, data, 4)
    assert [label for label in cut[0]["token_labels"] if label != -100] == [1, 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_the_words_on_whichever_side_the_padding_is(side: str) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.padding_side = side
    config = make_tiny_model(num_labels=3).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForTokenClassification(config).eval()
    ids = [[7, 8, 9, 10], [11, 12]]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    from datasets import Dataset

    (batch,) = make_batches(Dataset.from_dict(columns), tokenizer, 2)
    positions = [np.array([1, 3]), np.array([0])]
    found = token_logits(model, [batch], [np.array([0, 1])], positions, 3, progress=False)
    alone = [model(input_ids=torch.tensor([row])).logits[0].detach().numpy() for row in ids]
    expected = np.stack([alone[0][1], alone[0][3], alone[1][0]])
    if side == "right":
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == expected.shape  # on the left BERT counts padding as positions


@pytest.mark.parametrize(
    ("tokens", "tags", "what"),
    [
        (["a", "film"], "O O", "row 1: tags is 'O O', not a list"),
        ([], [], "row 1: tokens is an empty list; drop the row"),
    ],
)
def test_rows_that_are_no_words_with_labels_are_named(tokens: Any, tags: Any, what: str) -> None:
    table = Table("'here'", ("tokens", "tags"), {"tokens": [tokens], "tags": [tags]})
    with pytest.raises(UserError, match=what):
        checked_columns(task_of(*NAMES), table, True)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ("B-ORG", r"row 2: the model does not know the tags 'B-ORG' \(in 2 of 3 rows\)"),
        (None, "row 2: tags has a label that is missing; fill or drop the row"),
    ],
)
def test_a_row_is_a_sentence_and_not_a_word(wrong: Any, what: str) -> None:
    tags = [["O", "O", "O"], ["O", wrong, wrong], ["O", "O", wrong]]
    columns = {"tokens": [["a", "film", "plot"]] * 3, "tags": tags}
    with pytest.raises(UserError, match=what):
        checked_columns(task_of(*NAMES), Table("'here'", ("tokens", "tags"), columns), True)
