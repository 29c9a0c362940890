"""Ids of a dataset with class names become ids of the model by these names.

Without this a dataset that numbers its classes in another order scores a good model below chance.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from datasets import Sequence as Listed

from rfprune.errors import UserError
from rfprune.tasks.own_data import custom_task, task_from_training_data, with_columns
from rfprune.tasks.registry import Kind, Task, get_task
from rfprune.tasks.splits import load_split


class _Labels:
    def __init__(self, *names: str) -> None:
        self.id2label = dict(enumerate(names))


def task_of(
    names: Sequence[str] = (), kind: Kind = "classification", problem: str | None = None
) -> Task:
    return custom_task(_Labels(*names), problem, "model", kind)


def labels(task: Task, folder: Path, form: str, data: dict[str, Any], **features: Any) -> Any:
    """The labels of the data as they are loaded, saved in one of two forms."""
    texts = {"text": ["a"] * len(next(iter(data.values())))}
    if "tokens" in data or "question" in data:
        texts = {}
    kinds = {name: Value("string") for name in (*texts, *data)} | features
    dataset = Dataset.from_dict({**texts, **data}, features=Features(kinds))
    if form == "saved":
        DatasetDict(train=dataset, validation=dataset).save_to_disk(folder)
    else:
        for split in ("train", "validation"):
            dataset.to_parquet(folder / f"{split}.parquet")
    task = with_columns(task, folder, None, None)
    return load_split(task, "validation", folder)[task.label_column][:]


FORMS = pytest.mark.parametrize("form", ["saved", "parquet"])


@FORMS
@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        (("negative", "positive"), ("positive", "negative"), [1, 0]),
        (("NEGATIVE", "POSITIVE"), ("pos", "neg"), [1, 0]),
        (("neutral", "very good"), ("Very_Good", "neutral", "unused"), [1, 0]),
        (("1 star", "2 stars"), ("2 star", "1 stars"), [1, 0]),
        (("LABEL_0", "LABEL_1"), ("positive", "negative"), [0, 1]),
        (("LABEL_0", "LABEL_1"), ("1", "0"), [1, 0]),
        (("negative", "positive"), ("LABEL_0", "LABEL_1"), [0, 1]),
        (("negative", "positive"), ("0", "1"), [0, 1]),
        (("negative", "positive"), ("class 0", "class 1"), [0, 1]),
    ],
)
def test_classes_are_matched_by_name(
    form: str, model: tuple[str, ...], data: tuple[str, ...], expected: list[int], tmp_path: Path
) -> None:
    found = labels(task_of(model), tmp_path, form, {"label": [0, 1]}, label=ClassLabel(names=data))
    assert list(found) == expected


@FORMS
def test_tags_are_matched_by_name(form: str, tmp_path: Path) -> None:
    task = task_of(("O", "B-PER", "B-ORG"), "token-classification")
    tags = Listed(ClassLabel(names=["B-ORG", "O", "B-PER"]))
    data = {"tokens": [["a", "b", "c"], ["d"]], "ner_tags": [[0, 1, 2], [1]]}
    found = labels(task, tmp_path, form, data, tokens=Listed(Value("string")), ner_tags=tags)
    assert [list(row) for row in found] == [[2, 0, 1], [0]]


@FORMS
def test_several_labels_are_matched_by_name(form: str, tmp_path: Path) -> None:
    task = task_of(("loud", "red"), problem="multi_label_classification")
    several = Listed(ClassLabel(names=["red", "loud"]))
    found = labels(task, tmp_path, form, {"labels": [[0], [1], [0, 1], []]}, labels=several)
    assert [list(row) for row in found] == [[0, 1], [1, 0], [1, 1], [0, 0]]


@FORMS
@pytest.mark.parametrize("names", [("yes", "no"), ("loud", "not_loud"), ("True", "False")])
def test_a_column_per_label_is_read_by_its_names(
    form: str, names: tuple[str, str], tmp_path: Path
) -> None:
    task = task_of(("loud", "red"), problem="multi_label_classification")
    data = {"loud": [0, 1], "red": [0, 1]}
    kinds = {"loud": ClassLabel(names=list(names)), "red": Value("int64")}
    found = labels(task, tmp_path, form, data, **kinds)
    assert [list(row) for row in found] == [[1, 0], [0, 1]]


@FORMS
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("0", "1"), [0, 1]),
        (("1", "0"), [1, 0]),
        (("1", "2"), [0, 1]),
        (("B", "A"), [1, 0]),
        (("ending1", "ending0"), [1, 0]),
    ],
)
def test_choices_are_matched_by_name(
    form: str, names: tuple[str, ...], expected: list[int], tmp_path: Path
) -> None:
    data = {"question": ["?"] * 2, "ending0": ["a"] * 2, "ending1": ["b"] * 2, "label": [0, 1]}
    task = task_of(kind="multiple-choice")
    assert list(labels(task, tmp_path, form, data, label=ClassLabel(names=names))) == expected


def test_images_are_matched_by_name(tmp_path: Path) -> None:
    from PIL import Image as Picture

    stream = io.BytesIO()
    Picture.new("RGB", (1, 1)).save(stream, "png")
    features = Features({"img": Image(), "fine_label": ClassLabel(names=["dog", "cat"])})
    pictures = [{"bytes": stream.getvalue(), "path": None}] * 2
    dataset = Dataset.from_dict({"img": pictures, "fine_label": [0, 1]}, features=features)
    DatasetDict(train=dataset, validation=dataset).save_to_disk(tmp_path)
    task = with_columns(task_of(("cat", "dog"), "image-classification"), tmp_path, None, None)
    assert list(load_split(task, "validation", tmp_path)["label"]) == [1, 0]
    with pytest.raises(UserError, match="'dog'"):
        load_split(
            with_columns(task_of(("cat", "owl"), "image-classification"), tmp_path, None, None),
            "validation",
            tmp_path,
        )


@FORMS
def test_values_of_a_regression_are_the_names(form: str, tmp_path: Path) -> None:
    task = task_of(("score",))
    stars = ClassLabel(names=["1.5", "5", "3"])
    assert list(labels(task, tmp_path, form, {"label": [0, 1, 2]}, label=stars)) == [1.5, 5, 3]
    with pytest.raises(UserError, match="'bad'"):
        labels(task, tmp_path / "b", form, {"label": [0, 1]}, label=ClassLabel(names=["bad", "1"]))


def test_tasks_of_glue_are_matched_by_name(tmp_path: Path) -> None:
    names = ClassLabel(names=["positive", "negative"])
    features = Features({"sentence": Value("string"), "label": names})
    data = Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]}, features=features)
    DatasetDict(train=data).save_to_disk(tmp_path / "sst2")
    assert list(load_split(get_task("sst2"), "train", tmp_path)["label"]) == [1, 0]


@FORMS
@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("good one", "terrible"), ["good one", "terrible", "negative, positive", "id2label"]),
        (("negative", "neutral"), ["'neutral'", "negative, positive", "plain numbers"]),
        (("good", "positive"), ["'good'", "'positive'"]),
    ],
)
def test_other_names_are_refused(
    form: str, names: tuple[str, ...], parts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        labels(
            task_of(("negative", "positive")),
            tmp_path,
            form,
            {"label": [0, 1]},
            label=ClassLabel(names=names),
        )
    assert all(part in str(raised.value) for part in parts), raised.value


@FORMS
def test_a_missing_label_is_an_error(form: str, tmp_path: Path) -> None:
    names = ClassLabel(names=["positive", "negative"])
    with pytest.raises(UserError, match="row 2: label is missing"):
        labels(task_of(("negative", "positive")), tmp_path, form, {"label": [0, -1]}, label=names)


@FORMS
def test_a_new_head_has_the_names_of_the_data(form: str, tmp_path: Path) -> None:
    names = ClassLabel(names=["positive", "negative"])
    task = task_of(("negative", "positive"))
    labels(task, tmp_path, form, {"label": [0, 1]}, label=names)
    made = task_from_training_data(tmp_path, None, None)
    assert made.label_names == ("positive", "negative")
    assert list(load_split(made, "train", tmp_path)["label"]) == [0, 1]
