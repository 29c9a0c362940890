"""Task custom from a checkpoint and a table: kinds, columns and labels.

Without these a label could be scored as another one.
"""

import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from rfprune.errors import RfpruneWarning, UserError
from rfprune.tasks.evaluation import evaluate_model, prepare_evaluation
from rfprune.tasks.labels import class_ids, label_names
from rfprune.tasks.own_data import (
    custom_task,
    task_from_training_data,
    warn_about_truncation,
    with_columns,
)
from rfprune.tasks.registry import Task
from rfprune.tasks.splits import load_split

Write = Callable[..., Path]
TinyModel = Callable[..., Any]
FORMATS = ("parquet", "csv", "tsv", "jsonl", "json")


def task_of(*names: str, problem_type: str | None = None) -> Task:
    """What a checkpoint with these labels makes."""
    return custom_task(SimpleNamespace(id2label=dict(enumerate(names))), problem_type, "here")


MOODS = task_of("negative", "neutral", "positive")
NUMBER = task_of("LABEL_0")


def rows(*labels: Any, text: str = "sentence", label: str = "label") -> list[dict[str, Any]]:
    return [{text: f"text {row}", label: value} for row, value in enumerate(labels)]


@pytest.fixture
def made(tmp_path: Path, write: Write) -> Callable[..., Path]:
    """`made(train, validation, suffix="jsonl")`: the data folder with both files."""

    def make(train: Any, validation: Any, suffix: str = "jsonl") -> Path:
        for split, content in (("train", train), ("validation", validation)):
            if content is not None:
                write(tmp_path, content, f"{split}.{suffix}")
        return tmp_path

    return make


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_the_checkpoint_decides_the_kind() -> None:
    assert (MOODS.kind, MOODS.metric_name, MOODS.num_labels) == ("classification", "accuracy", 3)
    assert (NUMBER.kind, NUMBER.metric_name, NUMBER.num_labels) == ("regression", "spearmanr", 1)
    assert task_of("LABEL_0", problem_type="regression") == NUMBER
    assert task_of(*MOODS.label_names, problem_type="single_label_classification") == MOODS


@pytest.mark.parametrize(
    ("names", "problem_type", "what"),
    [
        (("a", "b"), "regression", "regression with 2 outputs"),
        (("a",), "single_label_classification", "has 1 class, and"),
        (("a", "b"), ["x"], "takes labels, or one number"),
    ],
)
def test_other_heads_are_refused(names: tuple[str, ...], problem_type: Any, what: str) -> None:
    with pytest.raises(UserError, match=what):
        task_of(*names, problem_type=problem_type)


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        (("label", "sentence"), ("sentence",)),
        (("text", "id", "label"), ("text",)),
        (("sentence2", "sentence1", "label"), ("sentence1", "sentence2")),
    ],
)
def test_the_usual_columns_need_no_naming(
    columns: tuple[str, ...], texts: tuple[str, ...], made: Callable[..., Path]
) -> None:
    line = dict.fromkeys(columns, "0")
    task = with_columns(MOODS, made([line, line], [line, line]), None, None)
    assert (task.text_columns, task.label_column) == (texts, "label")
    assert task.label_names == MOODS.label_names


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("folder", ["", "custom/"])
def test_every_format_and_both_places_give_the_same(
    suffix: str, folder: str, tmp_path: Path, write: Write
) -> None:
    named = {"text": "review", "label": "verdict"}
    write(tmp_path, rows("negative", "positive", **named), f"{folder}validation.{suffix}")
    write(tmp_path, rows("neutral", "positive", **named), f"{folder}train.{suffix}")
    task = with_columns(MOODS, tmp_path, ["review"], "verdict")
    loaded = load_split(task, "validation", tmp_path)
    assert loaded[:] == {"review": ["text 0", "text 1"], "verdict": [0, 2]}
    assert load_split(task, "train", tmp_path)[:]["verdict"] == [1, 2]


def test_training_texts_need_no_labels_and_nothing_else_is_read(made: Callable[..., Path]) -> None:
    train = [{"sentence": "one", "idx": "x"}, {"sentence": "two", "idx": 7}]
    data = made(train, rows(0, 1))
    task = with_columns(MOODS, data, None, None)
    loaded = load_split(task, "train", data, labels_required=False)
    assert loaded[:] == {"sentence": ["one", "two"]}
    with pytest.raises(UserError, match="no column label"):
        load_split(task, "train", data)


@pytest.mark.parametrize(
    ("train", "validation", "texts", "label", "parts"),
    [
        (rows(0), rows(0), ["review"], None, ["train.jsonl'", "'review'", "(sentence, label)"]),
        (rows(0), rows(0, text="review"), ["sentence"], None, ["validation", "(review, label)"]),
        (rows(0), rows(0, text="review"), None, None, ["none of the usual", "(review, label)"]),
        (rows(0), rows(0), None, "verdict", ["validation", "'verdict'", "(sentence, label)"]),
        (rows(0), rows(0, label="y"), None, None, ["validation", "'label'", "(sentence, y)"]),
        (rows(0), [{"text": "a", "sentence": "b"}], None, None, ["more than one", "text, sent"]),
        (rows(0), rows(0), ["label"], None, ["'label' is named twice"]),
        (rows(0), rows(0), ["sentence", "sentence"], None, ["'sentence' is named twice"]),
        (rows(0), rows(0), ["a", "b", "c"], None, ["one text or two"]),
        (rows(0), rows(0), [""], None, ["name is empty"]),
        (rows(0), None, None, None, ["no validation split", "--validation-fraction"]),
        (None, rows(0), None, None, ["no train split", "validation.jsonl", "without labels"]),
    ],
)
def test_columns_and_files_that_are_not_there(
    train: Any, validation: Any, texts: Any, label: Any, parts: list[str], made: Callable[..., Path]
) -> None:
    data = made(train, validation)
    sentence = refusal(with_columns, MOODS, data, texts, label)
    assert all(part in sentence for part in parts), sentence


def test_no_data_folder_says_what_one_holds(tmp_path: Path) -> None:
    assert "--data-dir DIR" in refusal(with_columns, MOODS, None, None, None)
    missing = refusal(with_columns, MOODS, tmp_path / "missing", None, None)
    assert "does not exist: give one that holds train.csv and validation.csv" in missing


@given(st.lists(st.integers(0, 2), min_size=1), st.data())
def test_ids_and_names_in_any_style_are_one(ids: list[int], data: Any) -> None:
    names = ("very_negative", "So so", "VERY-positive")
    task = task_of(*names)
    written = []
    for label in ids:
        style = data.draw(st.sampled_from([str, str.lower, str.upper, str.title]))
        separator = data.draw(st.sampled_from(["_", "-", " "]))
        name = style(names[label]).replace("_", separator).replace("-", separator)
        forms = (label, str(label), float(label), f"{label}.0", name, f" {name} ")
        written.append(data.draw(st.sampled_from(forms)))
    assert class_ids(task, written, "here") == ids


@pytest.mark.parametrize(
    ("names", "labels", "ids"),
    [
        (("1", "2", "3"), [1, "2", 3.0, "3.0"], [0, 1, 2, 2]),  # stars: a number is a name
        (("1", "0"), [1, 0], [0, 1]),
        (("-1", "0", "1"), ["-1", 0, 1], [0, 1, 2]),
        (("0", "1"), ["1", 0], [1, 0]),
        (("no", "yes"), [True, False], [1, 0]),
        (("false", "true"), [True, "False"], [1, 0]),
        (("LABEL_0", "LABEL_1"), ["label_1", 0], [1, 0]),
        (("A", "a"), ["a", "A"], [1, 0]),  # case counts where it must
        (("same", "same"), [1, 0], [1, 0]),
    ],
)
def test_a_label_is_what_the_model_calls_it(
    names: tuple[str, ...], labels: list[Any], ids: list[int]
) -> None:
    assert class_ids(task_of(*names), labels, "here") == ids


@pytest.mark.parametrize(
    ("names", "label", "what"),
    [
        (("negative", "positive"), "mixed", "'mixed'"),
        (("negative", "positive"), 2, "2"),
        (("negative", "positive"), -1, "-1"),
        (("negative", "positive"), 0.5, "0.5"),
        (("1", "2"), 0, "0"),  # 1 is a name here, so that 0 cannot be an id
        (("LABEL_0", "LABEL_1"), "positive", "'positive'"),
        (("same", "same"), "same", "'same'"),
        (("A", "a"), "ä", "'ä'"),
        (("negative", "positive"), [1], "[1]"),
    ],
)
def test_labels_the_model_does_not_know_are_named(
    names: tuple[str, ...], label: Any, what: str
) -> None:
    sentence = refusal(class_ids, task_of(*names), [names[0] if "1" in names else 0, label], "here")
    assert sentence.startswith("here, row 2: the model does not know the")
    assert f"{what} (in 1 of 2 rows)" in sentence
    assert f"0 {names[0]}, 1 {names[1]}" in sentence


def test_many_unknown_labels_are_counted() -> None:
    names = [f"intent {number}" for number in range(40)]
    sentence = refusal(class_ids, task_of(*names), [f"other {n % 15}" for n in range(60)], "here")
    assert "'other 9' and 5 more (in 60 of 60 rows)" in sentence
    assert "9 intent 9 and 30 more" in sentence


@pytest.mark.parametrize("label", [None, "", " ", float("nan")])
@pytest.mark.parametrize("task", [MOODS, NUMBER])
def test_a_label_that_is_missing(label: Any, task: Task, made: Callable[..., Path]) -> None:
    data = made(rows(0, 1), rows(1, label))
    task = with_columns(task, data, None, None)
    with pytest.raises(UserError, match=r"validation.jsonl', row 2: label is"):
        load_split(task, "validation", data)


@pytest.mark.parametrize("label", ["high", "3,5", "inf", [1]])
def test_a_regression_takes_numbers(label: Any, made: Callable[..., Path]) -> None:
    data = made(rows(0, 1), rows(-1e6, "2.5", label))
    task = with_columns(NUMBER, data, None, None)
    with pytest.raises(UserError, match=r"row 3: label is .*, but custom takes a number"):
        load_split(task, "validation", data)
    assert load_split(task, "train", data)["label"][:] == [0.0, 1.0]


@pytest.fixture
def texts() -> list[str]:
    generator = random.Random(3)
    words = "film movie story great good bad dull awful".split()
    return [" ".join(generator.choices(words, k=5)) for _ in range(30)]


def test_classes_are_scored_by_accuracy_and_macro_f1(
    texts: list[str],
    made: Callable[..., Path],
    tiny_model: TinyModel,
    tiny_tokenizer: Callable[..., Any],
) -> None:
    """Names and ids are one to the score; names for other ids are not."""
    model, tokenizer = tiny_model("bert", num_labels=3), tiny_tokenizer("bert")
    labels = [row % 3 for row in range(len(texts))]

    def scores(written: list[Any], task: Task = MOODS) -> Any:
        lines = [{"text": text, "label": y} for text, y in zip(texts, written, strict=True)]
        data = made(lines, lines)
        task = with_columns(task, data, None, None)
        return evaluate_model(model, prepare_evaluation(task, tokenizer, data, batch_size=8))

    by_id = scores(labels)
    predicted = by_id.logits[0].argmax(axis=1).tolist()
    assert len(set(predicted)) > 1
    hits = sum(one == other for one, other in zip(predicted, labels, strict=True))
    f1 = f1_score(labels, predicted, average="macro")
    assert by_id.scores == pytest.approx({"accuracy": hits / 0.3, "f1_macro": 100 * f1})
    assert by_id.score == by_id.scores["accuracy"]
    names = [MOODS.label_names[label] for label in labels]
    assert scores(names).scores == by_id.scores
    assert scores(names, task_of("positive", "negative", "neutral")).scores != by_id.scores


def test_numbers_are_scored_by_correlation(
    texts: list[str],
    made: Callable[..., Path],
    tiny_model: TinyModel,
    tiny_tokenizer: Callable[..., Any],
) -> None:
    model = tiny_model("bert", num_labels=1)
    pairs = [
        {"first": text, "second": text[::-1], "label": str(row)} for row, text in enumerate(texts)
    ]
    data = made(pairs, pairs, "csv")
    task = with_columns(NUMBER, data, ["first", "second"], None)
    evaluation_set = prepare_evaluation(task, tiny_tokenizer("bert"), data)
    assert all(batch["token_type_ids"].any() for batch in evaluation_set.batches), "pairs"
    before = evaluate_model(model, evaluation_set)
    assert set(before.scores) == {"spearmanr", "pearson"}
    assert before.score == before.scores["spearmanr"]
    model.classifier.weight.data.neg_()
    model.classifier.bias.data.neg_()
    assert evaluate_model(model, evaluation_set).score == pytest.approx(-before.score)
    assert abs(before.score) > 1


def test_truncated_texts_give_a_warning() -> None:
    mask = torch.ones(10, 8)
    mask[1:, 7:] = 0  # one row in ten is as long as 8
    with pytest.warns(RfpruneWarning, match="1 of 10 .* 8 tokens .*--max-length"):
        warn_about_truncation([{"attention_mask": mask}], 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_truncation([{"attention_mask": mask}], 9)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1, 0, "2", 0], ("LABEL_0", "LABEL_1", "LABEL_2")),
        (["no", "yes", "no", None], ("no", "yes")),
        ([5, 1, "3.0"], ("1", "3", "5")),
        ([0.5, 1], None),
        (["10", "x"], ("10", "x")),
    ],
)
def test_labels_to_learn_name_the_classes(labels: list[Any], names: Any) -> None:
    assert label_names(labels) == names


def test_what_is_to_be_learned_is_read_from_the_training_labels(made: Callable[..., Path]) -> None:
    data = made(rows(2, 4, 2), rows(4, 2))
    assert task_from_training_data(data, None, None).label_names == ("2", "4")
    assert task_from_training_data(data, None, None, regression=True).kind == "regression"
    data = made([{"sentence": "a"}], rows(4, 2))
    assert "which training needs" in refusal(task_from_training_data, data, None, None)
    data = made(rows("a", "a"), rows("a", "a"))
    assert "two or more" in refusal(task_from_training_data, data, None, None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"examples": "calibration"}, "1 of 4 calibration .* default length of 8 .*--max-length"),
        ({"is_longest": True}, "limit of model or tokenizer of 8 tokens.*shorten or split"),
        ({"is_default": False}, ""),
    ],
)
def test_the_warning_names_the_examples_and_the_limit(options: dict[str, Any], says: str) -> None:
    mask = torch.ones(4, 8, dtype=torch.int64)
    mask[1:, 5:] = 0
    batches = [{"attention_mask": mask}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_about_truncation(batches, 8, **options)
    assert len(caught) == bool(says)
    assert all(re.search(says, str(one.message)) for one in caught)
    with pytest.warns(RfpruneWarning, match="4 of 4 .* --max-length of 8"):
        warn_about_truncation([{"attention_mask": torch.ones(4, 8)}], 8, is_default=False)
