"""A push uploads the whole folder in one commit, or ends with one sentence about the reason.

Without these tests an answer of 401, or none, could end in a traceback, or a private model become
public.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path

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
    *("x" * 97, "a/" + "x" * 200, "$(reboot)", "a;b", "a\0b"),
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


def test_a_push_that_failed_goes_on_where_it_stopped(
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


def test_pushing_again_sends_what_has_changed(storage: str, hub: StubHub, run_folder: Path) -> None:
    push(run_folder, "someone/small")
    push(run_folder, "someone/small")
    assert len(hub.commits) == 1
    (run_folder / "log.txt").write_text("more\n", encoding="utf-8")
    push(run_folder, "someone/small")
    assert len(hub.commits) == 2
    assert hub.files == contents(run_folder)


def test_a_name_without_owner_is_the_users_own(hub: StubHub, run_folder: Path) -> None:
    hub.large = "no such ending"
    assert push(run_folder, "small").endswith("/me/small")
    assert hub.repositories == {"me/small": False}
    assert 'name = "me/small"' in hub.files[CARD_FILE].decode()


def test_the_card_learns_its_repository(hub: StubHub, run_folder: Path) -> None:
    hub.large = "no such ending"
    assert UNKNOWN_REPOSITORY in (run_folder / CARD_FILE).read_text(encoding="utf-8")
    push(run_folder, "someone/small")
    text = hub.files[CARD_FILE].decode()
    assert UNKNOWN_REPOSITORY not in text
    assert 'name = "someone/small"' in text


def test_private_is_private(hub: StubHub, run_folder: Path) -> None:
    hub.large = "no such ending"
    push(run_folder, "someone/small", private=True)
    push(run_folder, "someone/small", private=True)
    assert hub.repositories == {"someone/small": True}


def test_what_should_be_private_never_goes_to_a_public_repository(
    hub: StubHub, run_folder: Path
) -> None:
    hub.repositories["someone/small"] = False
    with pytest.raises(UserError, match="is public, so nothing was pushed"):
        push(run_folder, "someone/small", private=True)
    assert not hub.files
    assert set(hub.steps) == {"create", "info"}


@pytest.mark.parametrize("step", ["create", "preupload", "commit"])
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "refused the request (400)"),
        (401, "does not accept the token (401)"),
        (403, "may not write there (403)"),
        (404, "does not exist (404)"),
        (503, "error of its own (503)"),
    ],
)
def test_an_error_is_one_sentence_and_the_folder_stays(
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
    said = str(caught.value)
    assert words in said
    assert "\n" not in said
    assert f"The model is complete in '{run_folder}'" in said
    assert said.endswith(f"python scripts/push_to_hub.py {run_folder} someone/small")
    assert set(contents(run_folder)) == before
    assert capfd.readouterr() == ("", "")


def test_a_wrong_token_is_said(
    hub: StubHub, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(UserError, match="does not accept the token"):
        push(run_folder, "someone/small")


@pytest.mark.parametrize("step", ["create", "preupload", "commit"])
def test_a_hub_that_hangs_is_waited_for_only_so_long(
    step: str, hub: StubHub, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rfprune_hub, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.large = "no such ending"
    hub.answers = {step: HANG}
    with pytest.raises(UserError, match=r"did not answer within 0\.2 s"):
        push(run_folder, "someone/small")


def test_no_network_is_said(
    hub: StubHub, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # not listening: connections are refused
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        with pytest.raises(UserError, match="cannot be reached"):
            push(run_folder, "someone/small")


def test_the_library_is_left_as_it_was(hub: StubHub, run_folder: Path) -> None:
    from huggingface_hub import utils

    hub.large = "no such ending"
    before = (utils.logging.get_verbosity(), utils.are_progress_bars_disabled())
    timeout = utils.get_session().timeout
    push(run_folder, "someone/small")
    assert (utils.logging.get_verbosity(), utils.are_progress_bars_disabled()) == before
    assert utils.get_session().timeout == timeout


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="repository"):
        check_repository(name)


@pytest.mark.parametrize("name", ["small", "someone/small", "Some-One/bert_base.v2", "a/b"])
def test_an_ordinary_name_is_taken(name: str) -> None:
    check_repository(name)


@given(st.from_regex(r"[\w./~: -]{0,12}") | st.text(max_size=12))
def test_no_accepted_name_can_leave_its_place(name: str) -> None:
    try:
        check_repository(name)
    except UserError:
        return
    assert name.count("/") <= 1
    assert all(part not in ("", ".", "..") for part in name.split("/"))
    assert name.isascii() and name.isprintable() and not set(name) & set(" \\:?#%~")


def test_a_token_must_be_there(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    check_access()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="no token for the hub"):
        check_access()


def test_offline_is_refused(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        check_access()


@pytest.mark.parametrize("name", ["config.json", "report.json", CARD_FILE, "model.safetensors"])
def test_a_folder_that_is_not_whole_is_refused(name: str, hub: StubHub, run_folder: Path) -> None:
    check_folder(run_folder)
    (run_folder / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}"):
        push(run_folder, "someone/small")
    assert not hub.steps


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        check_folder(tmp_path / "none")
