"""The rows of the tasks, and the check of a checkpoint's labels against them.

Without these a head with swapped labels would score below chance, unnoticed.
"""

import itertools
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfprune.errors import RfpruneWarning, UserError
from rfprune.tasks.label_order import check_labels
from rfprune.tasks.own_data import custom_task
from rfprune.tasks.registry import CUSTOM, TASK_NAMES, TASKS, get_task

CLASSIFICATION = [task for task in TASKS.values() if task.kind == "classification"]


def config(*names: str) -> Any:
    """A checkpoint's configuration, as far as labels go."""
    return SimpleNamespace(id2label=dict(enumerate(names)))


def test_every_task_of_the_project_is_there_under_its_own_name() -> None:
    assert list(TASKS) == ("mrpc sst2 stsb cola rte qnli qqp mnli wnli squad squad_v2".split())
    assert all(get_task(name).name == name for name in TASKS)
    assert TASK_NAMES == (*TASKS, CUSTOM, "language-modeling", "similarity", "seq2seq")


@pytest.mark.parametrize("name", ["mprc", "", "MRPC", "custom"])
def test_an_unknown_task_is_named_beside_the_known_ones(name: str) -> None:
    """Custom is one, too, before its checkpoint and data are read."""
    with pytest.raises(UserError, match=f"{name!r}.*mrpc.*squad_v2"):
        get_task(name)


def test_the_checkpoint_s_own_labels_are_never_refused() -> None:
    task = custom_task(config("POSITIVE", "NEGATIVE"), None, "here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_labels(config("POSITIVE", "NEGATIVE"), task)
    with pytest.raises(UserError, match="needs a head with 2 labels"):
        check_labels(config("LABEL_0"), task)


def test_label_ids_are_those_of_the_hub() -> None:
    """Swapped ids would score a good model below chance."""
    assert get_task("rte").label_names == ("entailment", "not_entailment")
    assert get_task("qnli").label_names == ("entailment", "not_entailment")
    assert get_task("wnli").label_names == ("not_entailment", "entailment")
    assert get_task("mnli").label_names == ("entailment", "neutral", "contradiction")
    assert get_task("mrpc").label_names == ("not_equivalent", "equivalent")
    assert get_task("sst2").label_names == ("negative", "positive")


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("mrpc", ("LABEL_0", "LABEL_1")),
        ("mrpc", ("0", "1")),
        ("mrpc", ("not_paraphrase", "paraphrase")),
        ("mrpc", ("NOT_DUPLICATE", "DUPLICATE")),
        ("qqp", ("not_equivalent", "equivalent")),
        ("sst2", ("NEGATIVE", "POSITIVE")),
        ("sst2", ("neg", "pos")),
        ("sst2", ("1 star", "5 stars")),
        ("cola", ("ungrammatical", "Grammatical")),
        ("rte", ("entailment", "not-entailment")),
        ("mnli", ("ENTAILMENT", "NEUTRAL", "CONTRADICTION")),
        ("stsb", ("LABEL_0",)),
        ("stsb", ("similarity",)),
        ("squad", ("LABEL_0", "LABEL_1")),
    ],
)
def test_heads_in_the_task_s_order_pass_in_silence(task: str, names: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_labels(config(*names), get_task(task))


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("mrpc", ("equivalent", "not_equivalent")),
        ("mrpc", ("LABEL_1", "LABEL_0")),
        ("sst2", ("POSITIVE", "NEGATIVE")),
        ("sst2", ("unheard-of", "neg")),
        ("wnli", ("entailment", "not_entailment")),
        ("rte", ("not_entailment", "entailment")),
        ("mnli", ("contradiction", "entailment", "neutral")),
        ("mnli", ("contradiction", "neutral", "entailment")),
    ],
)
def test_another_order_is_refused_with_both_orders(task: str, names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="label order") as raised:
        check_labels(config(*names), get_task(task))
    assert ", ".join(names) in str(raised.value)
    assert ", ".join(get_task(task).label_names) in str(raised.value)


@pytest.mark.parametrize("task", CLASSIFICATION, ids=lambda task: task.name)
@given(data=st.data())
def test_only_the_identical_order_passes_however_it_is_written(task: Any, data: Any) -> None:
    order = data.draw(st.permutations(task.label_names))
    style = data.draw(st.sampled_from([str.lower, str.upper, str.title]))
    separator = data.draw(st.sampled_from(["_", "-", " ", ""]))
    names = [style(name).replace("_", separator) for name in order]
    if tuple(order) == task.label_names:
        check_labels(config(*names), task)
    else:
        with pytest.raises(UserError):
            check_labels(config(*names), task)


@pytest.mark.parametrize(
    ("task", "count", "wanted"),
    [
        ("mrpc", 3, "2 labels"),
        ("mnli", 2, "3 labels"),
        ("stsb", 2, "1 output"),
        ("sst2", 1, "2 labels"),
        ("squad", 3, "start and end"),
    ],
)
def test_a_wrong_number_of_labels_is_refused(task: str, count: int, wanted: str) -> None:
    names = [f"LABEL_{number}" for number in range(count)]
    with pytest.raises(UserError, match=f"{wanted}.* has {count} "):
        check_labels(config(*names), get_task(task))


def test_other_label_names() -> None:
    with pytest.raises(UserError, match="those of task sst2, not of mrpc"):
        check_labels(config("NEGATIVE", "POSITIVE"), get_task("mrpc"))
    with pytest.warns(RfpruneWarning, match="foo, bar.*negative, positive"):
        check_labels(config("foo", "bar"), get_task("sst2"))
    # config.json has text as keys, in any order
    check_labels(SimpleNamespace(id2label={"1": "positive", "0": "negative"}), get_task("sst2"))
    with pytest.raises(UserError, match=r"ids \[0, 2\]"):
        check_labels(SimpleNamespace(id2label={0: "negative", 2: "positive"}), get_task("sst2"))


def test_no_name_means_two_classes() -> None:
    """A synonym that two classes share would make the order check arbitrary."""
    from rfprune.tasks.label_order import _SYNONYMS, _label_ids

    for task in CLASSIFICATION:
        lists = [_SYNONYMS.get(name, ()) for name in task.label_names]
        for one, other in itertools.combinations(lists, 2):
            assert not set(one) & set(other)
        assert set(_label_ids(task).values()) == set(range(task.num_labels))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["mrpc", "sst2", "stsb"])
def test_real_checkpoints_fit_their_own_task_alone(shared: Path, name: str) -> None:
    content = json.loads((shared / f"models/minilm-l6-{name}/config.json").read_text())
    for task in TASKS.values():
        fits = task.name == name or (name == "mrpc" and task.name == "qqp")
        if task.kind == "question-answering":
            continue
        if fits:
            check_labels(SimpleNamespace(**content), task)
        else:
            with pytest.raises(UserError):
                check_labels(SimpleNamespace(**content), task)
