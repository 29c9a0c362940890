"""Errors and warnings that are meant for the user."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_LONGEST_SUMMARY = 200  # characters


class UserError(Exception):
    """A mistake that the user can correct. The command prints one line and exits with code 2.

    Attributes:
        on_one_process: true if only one process of several has the error and must print it; false
            if all have it, and the main process prints it.
    """

    on_one_process = False


class OtherProcessError(Exception):
    """Another process of this run has failed and prints the reason; exit code 2, no output."""


class RfpruneWarning(UserWarning):
    """Something that the user should know, while the run goes on; listed in the report."""


def check_installed(
    feature: str, packages: Iterable[str], alternative: str = "", extra: str = ""
) -> None:
    """Check that optional packages are installed.

    Args:
        feature: what needs them.
        packages: their names on PyPI.
        alternative: what to do without them.
        extra: the extra of rfprune that installs them.

    Raises:
        UserError: a package is missing; the message says how to install it.
    """
    modules = {"llama-cpp-python": "llama_cpp", "pillow": "PIL", "rouge-score": "rouge_score"}
    missing = [one for one in packages if importlib.util.find_spec(modules.get(one, one)) is None]
    if missing:
        ways = [f"run pip install {' '.join(missing)}"]
        ways += [f"install rfprune with its extra {extra}"] * bool(extra)
        ways += [alternative] * bool(alternative)
        raise UserError(
            f"{feature} needs packages that are not installed ({', '.join(missing)}): "
            f"{', or '.join(ways)}"
        )


def check_imports(feature: str, module: str, alternative: str) -> None:
    """Check that an installed package can be imported: its wheel may be for another system.

    Args:
        feature: what needs it.
        module: its name.
        alternative: what to do without it.

    Raises:
        UserError: its import fails.
    """
    try:
        import_without_statistics(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"{feature} needs {module}, which is installed but cannot be imported "
            f"({error_summary(error)}): reinstall it, or {alternative}"
        ) from error


def import_without_statistics(module: str) -> Any:
    """Import a package with `CI=true`, which stops OpenVINO and NNCF from sending usage statistics.

    They would send them from their import on, without asking.
    """
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        return importlib.import_module(module)
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


def error_summary(error: BaseException) -> str:
    """The message of an error as part of one sentence: one line, at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"unknown {text}"
    if len(text) > _LONGEST_SUMMARY:
        text = text[:_LONGEST_SUMMARY] + "..."
    return text.rstrip(".:")


def as_path(value: Any, name: str) -> Path:
    """Convert a text or a path to a path.

    Args:
        name: of the argument.

    Raises:
        UserError: the value is neither, or cannot be a path.
    """
    if not isinstance(value, str | os.PathLike) or "\0" in os.fsdecode(value):
        raise UserError(f"{name} {value!r:.60} is not a path; give a str or a pathlib.Path")
    return Path(value)
