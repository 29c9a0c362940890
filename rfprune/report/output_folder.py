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
    """See that a run may write its output to `folder`, before it works for minutes.

    Args:
        flags: what identifies the run; see `holds`.

    Raises:
        UserError: it is a file, holds something already, or cannot be written.
    """
    try:
        recover(folder)
        if not overwrite and flags is not None and holds(folder, {"flags": flags}):
            return
        check_free(folder, overwrite=overwrite, marker=REPORT_FILE)
        existing = next(path for path in folder.absolute().parents if path.exists())
        if not existing.is_dir():
            raise UserError(
                f"The output folder '{folder}' cannot be made, since '{existing}' is a file: "
                f"choose another with --output-dir."
            )
        temporary = hidden_folder(existing / folder.name, "partial")
        try:
            # All of it, since a name can be too long, or not allowed on this disk.
            (temporary / folder.absolute().relative_to(existing)).mkdir(parents=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"The output folder '{folder}' is not writable ({error.strerror}): choose another "
            f"with --output-dir."
        ) from error


def holds(folder: Path, identity: Mapping[str, str]) -> bool:
    """Whether a folder holds the finished output of a run, all entries of whose identity are these.

    A folder that was put in place is complete; weights that were taken away since are noticed.
    """
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        known, num_bytes = report["identity"], report["pruned"]["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    same = all(known.get(name) == value for name, value in identity.items())
    return same and weight_bytes(folder) == num_bytes


def weight_bytes(folder: Path) -> int:
    """Bytes of the weights that were saved to a folder."""
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
