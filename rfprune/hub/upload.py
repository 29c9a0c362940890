"""Uploads an output folder to the Hugging Face hub in one commit, with huggingface_hub.

The library handles tokens and resumes: files that are on the hub already are not sent again. Every
failure becomes a `UserError`, and the local folder stays as it is.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rfprune.errors import UserError
from rfprune.report.card import CARD_FILE, set_repository
from rfprune.report.output_folder import REPORT_FILE

ANSWER_SECONDS = 30.0
"""Limit for each answer of the hub; the library has none."""

_SILENT = 50  # logging.CRITICAL
_REQUIRED_FILES = ("config.json", REPORT_FILE, CARD_FILE)


def check_repository(name: str) -> None:
    """Check that a name is valid on the hub.

    Raises:
        UserError: it is not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name!r} is not a valid name of a repository: give NAME or USER/NAME, at most 96 "
            f"letters, digits, '-', '_' and '.', without '--' and '..', not ending in '.git'."
        ) from error
    if len(name) > 96:
        raise UserError(
            f"{name!r} is too long for a repository: give a name of at most 96 characters."
        )


def check_access() -> None:
    """Check that there is a token and that the hub may be used, before a run starts.

    Raises:
        UserError: there is no token, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "HF_HUB_OFFLINE is set, so nothing can be pushed to the hub: unset it, or push later "
            "with scripts/push_to_hub.py."
        )
    if get_token() is None:
        raise UserError(
            "There is no token for the hub: log in with 'hf auth login', or set HF_TOKEN to a "
            "token with write access."
        )


def check_folder(folder: Path) -> None:
    """Check that a folder is the complete output of a run.

    Raises:
        UserError: it does not exist, or files are missing.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder '{folder}': give the output folder of a run.")
    missing = [name for name in _REQUIRED_FILES if not (folder / name).is_file()]
    if not any(folder.glob("model*.safetensors")):
        missing.append("model.safetensors")
    if missing:
        raise UserError(
            f"'{folder}' has no {' and no '.join(missing)}, so it is not the output of a run: give "
            f"the output folder of a run, or run the command again."
        )


def list_files(folder: Path) -> list[tuple[str, int]]:
    """The files that a push uploads: path within the folder, and size in bytes."""
    return sorted(
        (path.relative_to(folder).as_posix(), path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    )


def describe_push(folder: Path, repository: str, *, private: bool = False) -> str:
    """The text of a dry run: the files that a push would send."""
    files = list_files(folder)
    lines = [f"  {name} ({size / 1e6:.2f} MB)" for name, size in files]
    total = sum(size for _, size in files)
    kind = "private " if private else ""
    return "\n".join(
        [
            f"Nothing was uploaded. A push to the {kind}repository '{repository}' would send "
            f"{len(files)} files ({total / 1e6:.2f} MB) in one commit:",
            *lines,
        ]
    )


def push(folder: Path, repository: str, *, private: bool = False, progress: bool = False) -> str:
    """Upload a folder to a repository of the hub, and create the repository if needed.

    Args:
        private: create a private repository, and refuse one that is public.

    Returns:
        The address of the repository.

    Raises:
        UserError: the folder is not complete, or the hub or the network failed.
    """
    from huggingface_hub import HfApi

    check_folder(folder)
    with (
        _errors_for_users(folder, repository),
        _quiet(progress),
        _answer_timeout(ANSWER_SECONDS),
    ):
        hub = HfApi()
        # None, not False: the repositories of an organisation may be private by default.
        created = hub.create_repo(repository, private=True if private else None, exist_ok=True)
        if private and not hub.repo_info(created.repo_id).private:
            raise UserError(
                f"The repository '{created.repo_id}' exists and is public, so nothing was pushed: "
                f"choose another name, make it private on the hub, or leave out --private."
            )
        set_repository(folder, created.repo_id)
        hub.upload_folder(
            repo_id=created.repo_id,
            folder_path=folder,
            commit_message="Pruned by rfprune",
        )
        return str(created)


@contextmanager
def _errors_for_users(folder: Path, repository: str) -> Iterator[None]:
    """Turn errors of the library, its HTTP client and its storage client into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        later = shlex.join(["python", "scripts/push_to_hub.py", str(folder), repository])
        raise UserError(
            f"The model is complete in '{folder}', but pushing it to '{repository}' failed: "
            f"{_reason(error)}; push it later with: {later}"
        ) from error


def _reason(error: BaseException) -> str:
    """The reason of a failure: the HTTP status or the type of the error behind it."""
    chain = list(_causes(error))
    for cause in chain:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return _status(int(status))
    names = {base.__name__ for cause in chain for base in type(cause).__mro__}
    if "TimeoutException" in names or "Timeout" in names:
        return f"the hub did not answer within {ANSWER_SECONDS:g} s"
    if names & {"TransportError", "ConnectionError"}:
        return "the hub cannot be reached (no network, or HF_ENDPOINT is wrong)"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.') if text else 'no details'}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(status: int) -> str:
    reasons = {
        401: "the hub does not accept the token (401): log in again with 'hf auth login', or set "
        "HF_TOKEN to a token with write access",
        403: "the token may not write there (403): use a token with write access, or your own "
        "repository",
        404: "the repository or its owner does not exist (404), or the token has no access to it",
        409: "another process is changing the repository (409)",
        413: "the files are too large for the hub (413)",
        429: "too many requests (429)",
    }
    if status >= 500:
        return f"the hub has an error of its own ({status})"
    return reasons.get(status, f"the hub refused the request ({status})")


@contextmanager
def _answer_timeout(seconds: float) -> Iterator[None]:
    """Limit the time that the library waits for each answer."""
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    before = getattr(session, "timeout", None)
    session.timeout = seconds
    try:
        yield
    finally:
        session.timeout = before


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Without log lines of the library (one before each retry), and progress bars on request."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    level, had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity(_SILENT)
    if not progress and had_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not progress and had_bars:
            enable_progress_bars()
