"""What a flag of the command may be given: readers for argparse, each with its own sentence."""

from __future__ import annotations

import difflib
import importlib.util
import re
import unicodedata
from collections.abc import Callable, Collection
from pathlib import Path

from rfprune.errors import UserError

_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def name(flag: str) -> Callable[[str], str]:
    """A reader of any text that is not empty."""

    def read(text: str) -> str:
        if not text.strip():
            raise UserError(f"{flag} is empty: give a folder, a hub id, an alias, or demo.")
        try:
            _path(flag, text).exists()
        except OSError as error:  # such as a name that is too long
            raise UserError(
                f"{flag} {text[:60]!r}... is no name that there can be ({error.strerror}): give a "
                f"folder, a hub id, an alias, or demo."
            ) from error
        return text

    return read


def _path(flag: str, text: str) -> Path:
    """A path, in which ~ is the home, without signs that would change a terminal or a report.

    Raises:
        UserError: it has such signs, or is below the home of somebody who is not there.
    """
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text):
        raise UserError(
            f"{flag} {ascii(text)[:80]} has control characters, or bytes that are no text, in its "
            f"name: rename it."
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{flag} {text[:60]!r} is below a home that is not there.") from error


def folder(flag: str) -> Callable[[str], Path]:
    """A reader of a folder's name, in which ~ is the home."""

    def read(text: str) -> Path:
        if not text.strip():
            raise UserError(f"{flag} is empty: give the name of a folder.")
        return _path(flag, text)  # shells leave the ~ of --flag=~/folder alone

    return read


def ratio(text: str) -> float:
    """A number between 0 and 1."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0.0 < number < 1.0:
        raise UserError(
            f"--constraint {text or repr(text)} is not a number between 0 and 1 (both excluded): "
            f"it is the fraction of the original cost to keep, such as 0.5."
        )
    return number


def points(text: str) -> float:
    """A number of points of 100, none of them included."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0.0 <= number < 100.0:
        raise UserError(
            f"--max-drop {text or repr(text)} is not a number from 0 up to 100: it is how many "
            f"points of the task's score may be lost, such as 1."
        )
    return number + 0.0  # -0.0 is 0


def whole_number(flag: str, smallest: int, largest: int | None = None) -> Callable[[str], int]:
    """A reader of a whole number within bounds."""
    wanted = f"of at least {smallest}" if largest is None else f"from {smallest} to {largest}"

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = smallest - 1
        if number < smallest or (largest is not None and number > largest):
            raise UserError(f"{flag} {text or repr(text)} is not a whole number {wanted}.")
        return number

    return read


def check_task(name: str, known: Collection[str]) -> None:
    """A UserError unless it is one of those; what it may have been meant to be is named."""
    if name in known:
        return
    close = difflib.get_close_matches(name.lower(), known, n=1)
    guess = f", did you mean {close[0]}" if close else ""
    raise UserError(f"Unknown task {name!r}{guess}: the tasks are {', '.join(known)}.")


def check_device(name: str | None) -> None:
    """A UserError unless it is a device that there can be."""
    if name is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"Unknown device {name!r}: choose cpu, cuda, cuda:N or mps.")


def check_exports(kinds: Collection[str], *, quantize: bool) -> None:
    """See that `--export` and `--quantize` can be done, before anything else is.

    Raises:
        UserError: they do not fit together, or packages of the extra rfprune[onnx] are missing.
    """
    if quantize and "onnx" not in kinds:
        raise UserError(
            "--quantize makes a second ONNX file, with int8 weights: add --export onnx, or leave "
            "--quantize out."
        )
    if "onnx" not in kinds:
        return
    missing = [package for package in _ONNX_PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"--export onnx needs what is not installed here ({', '.join(missing)}): run pip "
            f"install 'rfprune[onnx]', or leave --export onnx out."
        )
