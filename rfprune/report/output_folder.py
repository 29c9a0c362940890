"""The output folder of the command: checked before the work begins, recognised when it is complete.

`rfprune.model.staging` puts it in place in one step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from rfprune.errors import UserError
from rfprune.model.staging import check_free, hidden_folder, recover

REPORT_FILE = "report.json"
"""The file that marks a folder as an output of the command, which `--overwrite` may replace."""


def check_output(folder: Path, *, overwrite: bool, flags: str | None = None) -> None:
    """Check that a run can write its output to `folder`, before it starts.

    Args:
        flags: identity of the flags; a finished output of the same flags is accepted.

    Raises:
        UserError: the folder is a file or a link, is not empty, or cannot be written.
    """
    try:
        recover(folder)
        if not overwrite and flags is not None and holds(folder, {"flags": flags}):
            return
        check_free(folder, overwrite=overwrite, marker=REPORT_FILE)
        existing = next(path for path in folder.absolute().parents if path.exists())
        if not existing.is_dir():
            raise UserError(
                f"The output folder '{folder}' cannot be created, because '{existing}' is a file: "
                f"choose another folder with --output-dir."
            )
        temporary = hidden_folder(existing / folder.name, "partial")
        try:
            # The whole path: any name in it may be too long, or invalid on this disk.
            (temporary / folder.absolute().relative_to(existing)).mkdir(parents=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"The output folder '{folder}' is not writable ({error.strerror}): choose another "
            f"folder with --output-dir."
        ) from error


def holds(folder: Path, identity: Mapping[str, str]) -> bool:
    """Whether a folder has the complete output of a run with this identity.

    Args:
        identity: entries that the "identity" of report.json must have. Weights that were removed
            or changed since are noticed by their size.
    """
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        known, num_bytes = report["identity"], report["pruned"]["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    same = all(known.get(name) == value for name, value in identity.items())
    return same and weight_bytes(folder) == num_bytes


def weight_bytes(folder: Path) -> int:
    """Size of the saved weights of a model."""
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
