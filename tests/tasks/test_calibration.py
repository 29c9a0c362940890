"""Calibration samples: drawn without replacement, reproducible, without labels.

Without these a seed could draw other examples, or more data than drawn be tokenised."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from rfprune.errors import RfpruneWarning, UserError
from rfprune.tasks.calibration import calibration_batches, sample
from rfprune.tasks.encoding import encode
from rfprune.tasks.registry import get_task

NUMBERS = Dataset.from_dict({"number": list(range(100))})


def numbers(num_samples: int, seed: int) -> list[int]:
    return list(sample(NUMBERS, num_samples, seed)["number"][:])


@given(num_samples=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
def test_no_row_is_drawn_twice_and_less_is_the_beginning_of_more(
    num_samples: int, seed: int
) -> None:
    drawn = numbers(num_samples, seed)
    assert len(set(drawn)) == len(drawn) == num_samples
    assert drawn == numbers(100, seed)[:num_samples]


def test_the_seed_alone_decides() -> None:
    assert numbers(20, 1) == numbers(20, 1)
    assert numbers(20, 1) != numbers(20, 2)
    assert numbers(20, 1) != list(range(20))


def test_asking_for_more_than_there_is_warns_and_gives_all() -> None:
    with pytest.warns(RfpruneWarning, match="101 .*only 100"):
        assert sorted(numbers(101, 0)) == list(range(100))


@pytest.mark.parametrize("num_samples", [0, -1])
def test_no_samples_are_refused(num_samples: int) -> None:
    with pytest.raises(UserError, match=f"^{num_samples} "):
        numbers(num_samples, 0)


def batches(task: str, tokenizer: Any, data_dir: Path, **changes: Any) -> list[dict[str, Any]]:
    settings = {
        "num_samples": 40,
        "batch_size": 16,
        "max_length": None,
        "seed": 0,
        "with_labels": False,
    }
    return calibration_batches(get_task(task), tokenizer, data_dir, **(settings | changes))


@pytest.mark.parametrize("task", ["mrpc", "sst2", "stsb", "mnli", "squad", "squad_v2"])
def test_batches_hold_the_sample_and_no_labels(
    task: str, tiny_tokenizer: Callable[..., Any], tiny_data_dir: Path
) -> None:
    made = batches(task, tiny_tokenizer(), tiny_data_dir)
    assert [len(batch["input_ids"]) for batch in made] == [16, 16, 8]
    for batch in made:
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
        assert batch["attention_mask"].any(dim=0).all(), "no column may be padding alone"


def test_labels_come_on_demand(tiny_tokenizer: Callable[..., Any], tiny_data_dir: Path) -> None:
    for task, names in {
        "sst2": {"labels"},
        "stsb": {"labels"},
        "squad": {"start_positions", "end_positions"},
    }.items():
        made = batches(task, tiny_tokenizer(), tiny_data_dir, with_labels=True)
        assert all(names < set(batch) for batch in made)


@pytest.mark.parametrize("task", ["sst2", "squad"])
def test_data_without_labels_serves(
    task: str, tiny_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    row = {"sentence": "a fine film"}
    if task == "squad":
        row = {"question": "what is it ?", "context": "it is a fine film ."}
    (tmp_path / task).mkdir()
    (tmp_path / task / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    made = batches(task, tiny_tokenizer(), tmp_path, num_samples=3)
    assert len(made) == 1
    assert len(made[0]["input_ids"]) == 3
    with pytest.raises(UserError, match="no column (label|answers)"):
        batches(task, tiny_tokenizer(), tmp_path, num_samples=3, with_labels=True)


def test_long_contexts_give_as_many_windows_as_samples(
    tiny_tokenizer: Callable[..., Any], tiny_data_dir: Path
) -> None:
    assert sum(len(b["input_ids"]) for b in batches("squad", tiny_tokenizer(), tiny_data_dir,
        num_samples=48, max_length=32)) == 48  # fmt: skip


def test_only_what_is_drawn_is_tokenised(
    tiny_tokenizer: Callable[..., Any], tiny_data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenising all of SQuAD to use 2048 questions would take longer than pruning."""
    seen = []

    def counting(task: Any, tokenizer: Any, dataset: Any, max_length: int | None) -> Any:
        seen.append(len(dataset))
        return encode(task, tokenizer, dataset, max_length)

    monkeypatch.setattr("rfprune.tasks.calibration.encode", counting)
    batches("squad", tiny_tokenizer(), tiny_data_dir, num_samples=5)
    assert seen == [5]
