"""A push uploads the whole folder in one commit, or ends with one sentence about the reason.

Without these tests an answer of 401, or none, could end in a traceback, or a private model become
public.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfprune.errors import UserError
from rfprune.hub import upload as rfprune_hub
from rfprune.hub.upload import check_access, check_folder, check_repository, list_files, push
from rfprune.report.card import CARD_FILE, UNKNOWN_REPOSITORY
from tests.hub.stub_hub import HANG, StubHub

# The library uploads large files in a way that its HTTP client is about to give up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

HOSTILE_NAMES = [
    *("", " ", ".", "..", "../secret", "a/../b", "/etc/passwd", "a/b/c", "a//b", "a/", "/a"),
    *("~/model", "a\\b", "a b", "user/na me", "a\nb", "a/b\n", "-x", "x-", ".x", "a--b", "a..b"),
    *("user/model.git", "https://huggingface.co/a/b", "a?b", "a#b", "a%2fb", "a:b", "\u0444/b"),
    *("x" * 97, "a/" + "x" * 96, "a/" + "x" * 200, "$(reboot)", "a;b", "a\0b"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name, _ in list_files(folder)}


@pytest.fixture(params=["streamed", "large file storage"])
def storage(request: pytest.FixtureRequest, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of the library: its pipeline, and, without hf_xet, commits after LFS uploads."""
    from huggingface_hub import constants

    if request.param == "large file storage":
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    else:
        hub.large = "no such ending"  # the storage behind hf_xet is beyond a stub
    return str(request.param)


def test_everything_arrives_in_one_commit(storage: str, hub: StubHub, run_folder: Path) -> None:
    assert push(run_folder, "someone/small") == f"{hub.endpoint}/someone/small"
    assert hub.files == contents(run_folder)
    assert {"config.json", "model.safetensors", "plots/kept.png", CARD_FILE} <= set(hub.files)
    assert hub.commits == ["Pruned by rfprune"]
    assert hub.repositories == {"someone/small": False}
    assert ("put" in hub.steps) == (storage == "large file storage")


def test_a_failed_push_resumes(
    hub: StubHub, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.answers = {"commit": 403}
    with pytest.raises(UserError, match="403"):
        push(run_folder, "someone/small")
    assert "put" in hub.steps
    hub.answers, hub.steps[:] = {}, []
    push(run_folder, "someone/small")
    assert "put" not in hub.steps
    assert hub.files == contents(run_folder)


def test_a_second_push_sends_only_changes(storage: str, hub: StubHub, run_folder: Path) -> None:
    push(run_folder, "someone/small")
    push(run_folder, "someone/small")
    assert len(hub.commits) == 1
    (run_folder / "log.txt").write_text("more\n", encoding="utf-8")
    push(run_folder, "someone/small")
    assert len(hub.commits) == 2
    assert hub.files == contents(run_folder)


@pytest.mark.parametrize(
    ("name", "repository"), [("small", "me/small"), ("someone/small", "someone/small")]
)
def test_the_card_has_the_repository_that_the_hub_created(
    name: str, repository: str, hub: StubHub, run_folder: Path
) -> None:
    hub.large = "no such ending"
    assert UNKNOWN_REPOSITORY in (run_folder / CARD_FILE).read_text(encoding="utf-8")
    assert push(run_folder, name).endswith(f"/{repository}")
    assert hub.repositories == {repository: False}
    text = hub.files[CARD_FILE].decode()
    assert UNKNOWN_REPOSITORY not in text
    assert f'name = "{repository}"' in text


def test_a_private_push_creates_a_private_repository(hub: StubHub, run_folder: Path) -> None:
    """And leaves the settings of the library as they were."""
    from huggingface_hub import utils

    def settings() -> tuple[Any, ...]:
        verbosity, hidden = utils.logging.get_verbosity(), utils.are_progress_bars_disabled()
        return verbosity, hidden, utils.get_session().timeout

    hub.large = "no such ending"
    before = settings()
    for _ in range(2):
        push(run_folder, "someone/small", private=True)
    assert hub.repositories == {"someone/small": True}
    assert settings() == before


def test_a_private_push_refuses_a_public_repository(hub: StubHub, run_folder: Path) -> None:
    hub.repositories["someone/small"] = False
    with pytest.raises(UserError, match="is public, so nothing was pushed"):
        push(run_folder, "someone/small", private=True)
    assert not hub.files
    assert set(hub.steps) == {"create", "info"}


@pytest.mark.parametrize(
    ("step", "status", "words"),
    [
        ("create", 400, "refused the request (400)"),
        ("create", 401, "does not accept the token (401)"),
        ("preupload", 403, "may not write there (403)"),
        ("create", 404, "does not exist (404)"),
        ("preupload", 503, "error of its own (503)"),
        ("commit", 503, "error of its own (503)"),
    ],
)
def test_an_error_is_one_sentence_and_keeps_the_folder(
    status: int,
    words: str,
    step: str,
    hub: StubHub,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's retries
    hub.large = "no such ending"
    hub.answers = {step: status, "info": 404}
    before = set(contents(run_folder))
    with pytest.raises(UserError) as caught:
        push(run_folder, "someone/small")
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert f"The model is complete in '{run_folder}'" in message
    assert message.endswith(f"python scripts/push_to_hub.py {run_folder} someone/small")
    assert set(contents(run_folder)) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("step", ["create", "preupload", "commit"])
def test_a_hub_that_does_not_answer_is_an_error(
    step: str, hub: StubHub, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rfprune_hub, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.large = "no such ending"
    hub.answers = {step: HANG}
    with pytest.raises(UserError, match=r"did not answer within 0\.2 s"):
        push(run_folder, "someone/small")


def test_no_network_is_an_error(
    hub: StubHub, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # not listening: connections are refused
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        with pytest.raises(UserError, match="cannot be reached"):
            push(run_folder, "someone/small")


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_invalid_names_are_errors(name: str) -> None:
    with pytest.raises(UserError, match="repository"):
        check_repository(name)


@pytest.mark.parametrize("name", ["small", "someone/small", "Some-One/bert_base.v2", "a/b"])
def test_valid_names_are_accepted(name: str) -> None:
    check_repository(name)


@given(st.from_regex(r"[\w./~: -]{0,12}") | st.text(max_size=12))
def test_accepted_names_cannot_leave_their_place(name: str) -> None:
    try:
        check_repository(name)
    except UserError:
        return
    assert name.count("/") <= 1
    assert all(part not in ("", ".", "..") for part in name.split("/"))
    assert name.isascii() and name.isprintable() and not set(name) & set(" \\:?#%~")


def test_access_needs_a_token_and_a_connection(
    hub: StubHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_access()
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.get_token", lambda: None)
        with pytest.raises(UserError, match="no token for the hub.*hf auth login"):
            check_access()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*scripts/push_to_hub\.py"):
        check_access()


@pytest.mark.parametrize("name", ["config.json", "report.json", CARD_FILE, "model.safetensors"])
def test_an_incomplete_folder_is_an_error(name: str, hub: StubHub, run_folder: Path) -> None:
    check_folder(run_folder)
    with pytest.raises(UserError, match="There is no folder.*output folder of a run"):
        check_folder(run_folder / "none")
    (run_folder / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}"):
        push(run_folder, "someone/small")
    assert not hub.steps
