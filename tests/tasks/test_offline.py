"""Without the hub: one error in one sentence, no retries, and the same checks as for files.

Without these a run without a connection would hang for minutes."""

import socket
from typing import Any

import datasets
import huggingface_hub.constants
import pytest

from rfprune.errors import UserError
from rfprune.tasks import offline
from rfprune.tasks.registry import get_task
from rfprune.tasks.splits import load_split

SST2, MRPC, SQUAD = (get_task(name) for name in ("sst2", "mrpc", "squad"))


def test_without_the_hub_one_sentence_says_what_was_wanted_and_the_ways_out() -> None:
    with pytest.raises(
        UserError, match=r"train split .*nyu-mll/glue \(mrpc\).*--data-dir"
    ) as raised:
        load_split(MRPC, "train", None)
    assert "\n" not in str(raised.value)


def test_what_the_hub_raises_is_shown_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_arguments: Any, **_options: Any) -> None:
        raise ConnectionError("no route\nto host.")

    monkeypatch.setattr(datasets, "load_dataset", failing)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(offline, "is_reachable", lambda: True)
    with pytest.raises(UserError, match=r"\(no route to host\)"):
        load_split(MRPC, "train", None)


def test_what_the_hub_has_is_checked_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def loading(path: str, config: str, split: str) -> datasets.Dataset:
        asked.append((path, config, split))
        return datasets.Dataset.from_list([{"sentence": "fine", "label": -1, "idx": 0}])

    monkeypatch.setattr(datasets, "load_dataset", loading)
    with pytest.raises(UserError, match=r"The test split of dataset nyu-mll/glue \(sst2\), row 1"):
        load_split(SST2, "test", None)
    assert len(load_split(SST2, "test", None, labels_required=False)) == 1
    assert asked[0] == ("nyu-mll/glue", "sst2", "test")


def test_an_unreachable_hub_gets_no_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(offline, "is_reachable", lambda: False)
    seen = []

    def failing_within() -> None:
        with offline.cached_when_unreachable() as may_ask:
            seen.append(may_ask)
            seen.append(huggingface_hub.constants.HF_HUB_OFFLINE)
            seen.append(datasets.config.HF_HUB_OFFLINE)
            raise RuntimeError("what was there before must come back all the same")

    with pytest.raises(RuntimeError):
        failing_within()
    assert seen == [False, True, True]
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(offline, "is_reachable", lambda: True)
    with offline.cached_when_unreachable() as may_ask:
        assert may_ask
        assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_whether_the_hub_is_reachable_is_found_by_connecting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offline, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert offline.is_reachable()
    assert not offline.is_reachable()
    monkeypatch.setattr(offline, "getproxies", lambda: {"no": "localhost"})
    assert not offline.is_reachable()
    monkeypatch.setattr(offline, "getproxies", lambda: {"https": "http://proxy"})
    assert offline.is_reachable(), "behind a proxy a connection of our own says nothing"


@pytest.mark.network
@pytest.mark.parametrize("task", [MRPC, get_task("mnli"), SQUAD])
def test_the_hub_has_the_columns_that_the_tasks_name(task: Any) -> None:
    for split in task.validation_splits:
        assert len(load_split(task, split, None)) > 400
