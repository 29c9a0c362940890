"""The output folder: checked before the work begins, put in place in one step when it is done.

Everything is first written to a hidden folder beside it. Only a finished one is renamed, so an
error, an interruption or a full disk leaves nothing half-written and no earlier output spoilt. What
a process leaves hidden that is killed on the spot, the next run of the same command removes; what
was being replaced just then, it puts back.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import socket
import stat
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rfprune.errors import UserError

REPORT_FILE = "report.json"
"""What marks a folder as an output of ours, which `--overwrite` may replace."""


_DAY_SECONDS = 86400.0
"""Nothing is written for so long: a hidden folder this old is of a process that is gone."""


def check_output(folder: Path, *, overwrite: bool, flags: str | None = None) -> None:
    """See that a run may write its output to `folder`, before it works for minutes.

    Args:
        flags: what identifies the run; see `holds`.

    Raises:
        UserError: it is a file, holds something already, or cannot be written.
    """
    if folder.name in ("", ".."):
        raise UserError(
            f"The output folder '{folder}' cannot be put in place under that name: give the name "
            f"of a new folder with --output-dir."
        )
    try:
        _recover(folder)
        if not overwrite and flags is not None and holds(folder, {"flags": flags}):
            return
        _check_free(folder, overwrite)
        existing = next(path for path in folder.absolute().parents if path.exists())
        if not existing.is_dir():
            raise UserError(
                f"The output folder '{folder}' cannot be made, since '{existing}' is a file: "
                f"choose another with --output-dir."
            )
        temporary = _beside(existing / folder.name, "partial")
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


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.is_symlink():
        raise UserError(
            f"The output folder '{folder}' is a link, which a folder cannot replace: give the "
            f"folder that it leads to, or another, with --output-dir."
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir '{folder}' is a file: give the name of a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"The output folder '{folder}' exists already: choose another with --output-dir, or "
            f"replace it with --overwrite."
        )
    if not (folder / REPORT_FILE).is_file():
        raise UserError(
            f"The output folder '{folder}' holds something that rfprune has not written (it has "
            f"no {REPORT_FILE}), so --overwrite leaves it alone: choose another folder."
        )


@contextmanager
def staged(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder to write to, which becomes `folder` at the end, or is gone after an error.

    Raises:
        UserError: the disk is full, or something else keeps the folder from being written.
    """
    made = [path for path in (folder.parent, *folder.parent.parents) if not path.exists()]
    temporary = _beside(folder, "partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _set_default_permissions(temporary)
        _put_in_place(temporary, folder, overwrite)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if is_writing_error(error):
            raise UserError(
                f"The pruned model cannot be written to '{folder}' "
                f"({str(error).splitlines()[0].rstrip('.')}): make room or choose another place "
                f"with --output-dir; nothing was left behind."
            ) from error
        raise


def _set_default_permissions(folder: Path) -> None:
    """Give each file the permissions of a new file; safetensors restricts its files to the owner.

    A probe file tells these permissions. Reading the umask would mean setting it, for all threads.
    """
    probe = folder / ".permissions"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _beside(folder: Path, purpose: str) -> Path:
    """A hidden name of this process, short where the folder's own is as long as names may be."""
    return folder.with_name(f"{_hidden(folder)}.{_host()}-{os.getpid()}.{purpose}")


def _hidden(folder: Path) -> str:
    return f".{folder.name[:20]}-{zlib.crc32(folder.name.encode()):08x}"


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())[:30]


def _recover(folder: Path) -> None:
    """Clear away what killed processes left of this folder."""
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir():
        return
    for path in parent.glob(f"{glob.escape(_hidden(folder))}.*"):
        left = re.fullmatch(
            r"\.(?P<host>[\w-]*)-(?P<process>\d+)\.(?P<purpose>partial|old)",
            path.name.removeprefix(_hidden(folder)),
        )
        if left is None or not _is_abandoned(path, left["host"], int(left["process"])):
            continue
        if left["purpose"] == "old" and not folder.exists():
            path.rename(folder)  # killed before the new one was in its place
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path, host: str, process: int) -> bool:
    """This process has nothing there yet: its number is that of one before it."""
    if host == _host() and os.name == "posix":
        return process == os.getpid() or not _is_running(process)
    return time.time() - path.stat().st_mtime > _DAY_SECONDS


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def is_writing_error(error: BaseException) -> bool:
    """Whether the disk, not the program, is at fault; safetensors has an error type of its own."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _put_in_place(temporary: Path, folder: Path, overwrite: bool) -> None:
    if not (overwrite and folder.exists()):
        temporary.rename(folder)  # replaces an empty folder, refuses any other
        return
    old = _beside(folder, "old")
    folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
