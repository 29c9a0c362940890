"""Folders that appear whole or not at all.

Everything is first written to a hidden folder beside the target. Only a finished folder is renamed,
so an error, an interruption or a full disk leaves nothing half-written and no earlier folder
damaged. A process that is killed leaves its hidden folders behind: `recover` removes them, and puts
back a folder that was just being replaced.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import socket
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rfprune.errors import UserError

_ABANDONED_SECONDS = 86400.0
"""A hidden folder of another machine that is older than this belongs to a process that is gone."""


def check_free(folder: Path, *, overwrite: bool, marker: str) -> None:
    """Check that a folder is new or empty, or that it may be replaced.

    Args:
        marker: name of a file by which a folder that rfprune has written is recognised; no other
            folder is replaced.

    Raises:
        UserError: the name is not that of a folder to be made, or the folder holds something.
    """
    if folder.name in ("", ".."):
        raise UserError(
            f"The output folder '{folder}' cannot be replaced under that name: give the name of a "
            f"new folder (--output-dir)."
        )
    if folder.is_symlink():
        raise UserError(
            f"The output folder '{folder}' is a link, which a folder cannot replace: give the "
            f"folder that it leads to, or another (--output-dir)."
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"The output folder '{folder}' is a file: give the name of a folder (--output-dir)."
        )
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"The output folder '{folder}' already exists: choose another (--output-dir), or "
            f"replace it with --overwrite (overwrite=True)."
        )
    if not (folder / marker).is_file():
        raise UserError(
            f"The output folder '{folder}' holds something that rfprune has not written (it has "
            f"no {marker}), so it is not replaced: choose another folder (--output-dir)."
        )


@contextmanager
def staged(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder to write to, which becomes `folder` at the end, or is removed on an error.

    Raises:
        UserError: the disk is full, or the folder cannot be written for another reason.
    """
    made = [path for path in (folder.parent, *folder.parent.parents) if not path.exists()]
    temporary = hidden_folder(folder, "partial")
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
        if _is_writing_error(error):
            raise UserError(
                f"The pruned model cannot be written to '{folder}' "
                f"({str(error).splitlines()[0].rstrip('.')}): make room or choose another folder "
                f"(--output-dir); nothing was left behind."
            ) from error
        raise


def hidden_folder(folder: Path, purpose: str) -> Path:
    """The hidden folder of this process beside `folder`.

    Args:
        purpose: "partial" for what is being written, "old" for what is being replaced.

    Returns:
        A path with a short name, even if the name of `folder` is as long as the disk allows.
    """
    return folder.with_name(f"{_hidden_prefix(folder)}.{_host()}-{os.getpid()}.{purpose}")


def recover(folder: Path) -> None:
    """Remove or put back what killed processes left of a folder."""
    if folder.name in ("", ".."):
        return
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir():
        return
    for path in parent.glob(f"{glob.escape(_hidden_prefix(folder))}.*"):
        left = re.fullmatch(
            r"\.(?P<host>[\w-]*)-(?P<process>\d+)\.(?P<purpose>partial|old)",
            path.name.removeprefix(_hidden_prefix(folder)),
        )
        if left is None or not _is_abandoned(path, left["host"], int(left["process"])):
            continue
        if left["purpose"] == "old" and not folder.exists():
            path.rename(folder)  # the process was killed before the new folder was in place
        else:
            shutil.rmtree(path, ignore_errors=True)


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


def _hidden_prefix(folder: Path) -> str:
    return f".{folder.name[:20]}-{zlib.crc32(folder.name.encode()):08x}"


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())[:30]


def _is_abandoned(path: Path, host: str, process: int) -> bool:
    """Whether the process that made a hidden folder is gone.

    A folder with the number of this process was made by an earlier process of that number.
    """
    if host == _host() and os.name == "posix":
        return process == os.getpid() or not _is_running(process)
    return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        return True
    return True


def _is_writing_error(error: BaseException) -> bool:
    """Whether the disk caused an error; safetensors has an error type of its own."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _put_in_place(temporary: Path, folder: Path, overwrite: bool) -> None:
    if not (overwrite and folder.exists()):
        temporary.rename(folder)  # replaces an empty folder, refuses any other
        return
    old = hidden_folder(folder, "old")
    folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
