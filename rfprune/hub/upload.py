"""Put an output folder on the Hugging Face hub, in one commit, by the hub's own library.

The library handles tokens, and resumes: what is there already is not sent again. Whatever goes
wrong is one sentence, and the folder on disk stays as it is.
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
"""How long the hub may say nothing; the library itself would wait for ever."""

_SILENT = 50  # logging.CRITICAL
_NEEDED = ("config.json", REPORT_FILE, CARD_FILE)


def check_repository(name: str) -> None:
    """See that a name can be one on the hub.

    Raises:
        UserError: it cannot; the sentence says what one looks like.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name!r} cannot be the name of a repository: give NAME or USER/NAME of at most 96 "
            f"letters, digits, '-', '_' and '.', without '--' and '..', not ending in '.git'."
        ) from error
    if len(name) > 96:
        raise UserError(f"{name!r} is too long for a repository: its name has at most 96 signs.")


def check_access() -> None:
    """See that there is a token and that the hub may be asked, before anything takes time.

    Raises:
        UserError: there is none, or the library is told to stay offline.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "HF_HUB_OFFLINE is set, so nothing can be pushed to the hub: unset it, or leave the "
            "push out and do it later with scripts/push_to_hub.py."
        )
    if get_token() is None:
        raise UserError(
            "There is no token for the hub: log in with 'hf auth login' or set HF_TOKEN to a token "
            "with write access."
        )


def check_folder(folder: Path) -> None:
    """See that a folder is one that a run has left whole.

    Raises:
        UserError: it is not.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder '{folder}': give the output folder of a run.")
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if not any(folder.glob("model*.safetensors")):
        missing.append("model.safetensors")
    if missing:
        raise UserError(
            f"'{folder}' has no {' and no '.join(missing)}, so it is no output folder of a run: "
            f"give one that is, or run the command again."
        )


def files_of(folder: Path) -> list[tuple[str, int]]:
    """What a push uploads: names within the folder, and bytes."""
    return sorted(
        (path.relative_to(folder).as_posix(), path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    )


def plan_of(folder: Path, repository: str, *, private: bool = False) -> str:
    """What a push would do, for a dry run."""
    files = files_of(folder)
    lines = [f"  {name} ({size / 1e6:.2f} MB)" for name, size in files]
    total = sum(size for _, size in files)
    kind = "private " if private else ""
    return "\n".join(
        [
            f"Nothing was uploaded. A push to the {kind}repository '{repository}' would send "
            f"{len(files)} files of {total / 1e6:.2f} MB in one commit:",
            *lines,
        ]
    )


def push(folder: Path, repository: str, *, private: bool = False, progress: bool = False) -> str:
    """Upload a folder to a repository of the hub, which is made if need be; gives its address.

    Args:
        private: nobody else sees the repository. One that is public already is not pushed to.

    Raises:
        UserError: the hub or the network did not play along.
    """
    from huggingface_hub import HfApi

    check_folder(folder)
    with _said(folder, repository), _quiet(progress), _patience(ANSWER_SECONDS):
        hub = HfApi()
        # False would be asked of an organisation whose repositories are private by default.
        made = hub.create_repo(repository, private=True if private else None, exist_ok=True)
        if private and not hub.repo_info(made.repo_id).private:
            raise UserError(
                f"The repository '{made.repo_id}' exists and is public, so nothing was pushed to "
                f"it: choose another name, make it private on the hub, or leave out --private."
            )
        set_repository(folder, made.repo_id)
        hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="Pruned by rfprune",
        )
        return str(made)


@contextmanager
def _said(folder: Path, repository: str) -> Iterator[None]:
    """Turn what the library, its HTTP client or its storage client raise into one sentence."""
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
    """What to say of an error, by the status or the kind of failure behind it."""
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
    return f"{type(error).__name__}: {text[0].rstrip('.') if text else 'no more is known'}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(status: int) -> str:
    reasons = {
        401: "the hub does not accept the token (401): log in again with 'hf auth login', or set "
        "HF_TOKEN to a token with write access",
        403: "the token may not write there (403): take one with write access, or a repository of "
        "your own",
        404: "the hub does not know the repository or its owner (404), or the token may not see it",
        409: "somebody else is changing the repository (409)",
        413: "the hub finds the files too large (413)",
        429: "the hub asks for patience (429: too many requests)",
    }
    if status >= 500:
        return f"the hub itself failed ({status})"
    return reasons.get(status, f"the hub refused ({status})")


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Wait so long for each answer, and no longer."""
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
    """No log lines of the library, which come before each of its retries; bars where wanted."""
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
