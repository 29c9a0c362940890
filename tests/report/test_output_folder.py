"""The output folder appears whole or not at all, and nothing that is not ours is ever replaced."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rfprune.errors import UserError
from rfprune.model.staging import staged
from rfprune.report.output_folder import REPORT_FILE, check_output


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def earlier_output(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / REPORT_FILE).write_text("{}")
    (folder / "old").write_text("old")
    return folder


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "an earlier output"])
@pytest.mark.parametrize("name", ["a/b", "a" * 255])
def test_a_finished_folder_takes_its_place_whole(name: str, before: str, tmp_path: Path) -> None:
    """Folders that are refused are in tests/robustness."""
    folder = tmp_path / name
    overwrite = before == "an earlier output"
    if overwrite:
        earlier_output(folder)
    elif before == "an empty folder":
        folder.mkdir(parents=True)
    there = everything_in(tmp_path)
    check_output(folder, overwrite=overwrite)
    assert everything_in(tmp_path) == there, "the check leaves nothing"
    with staged(folder, overwrite=overwrite) as temporary:
        (temporary / "file").write_text("done")
        assert not (folder / "file").exists()
    assert everything_in(tmp_path) == {name, name.split("/", maxsplit=1)[0], f"{name}/file"}


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_permissions_of_new_files(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process' own umask stays as it is meanwhile: other threads write files too."""
    before = os.umask(umask)
    try:
        (tmp_path / "new").touch()
        monkeypatch.setattr(os, "umask", None)
        with staged(tmp_path / "a", overwrite=False) as temporary:
            (temporary / "file").touch(mode=0o600)
    finally:
        monkeypatch.undo()
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode for name in ("a/file", "new")]
    assert modes[0] == modes[1]
    assert everything_in(tmp_path / "a") == {"file"}


NO_SPACE = "No space left on device"


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
        (ValueError("bug"), ValueError, "bug"),
        (OSError(errno.ENOSPC, NO_SPACE), UserError, f"cannot be written .*{NO_SPACE}"),
        (
            type("SafetensorError", (Exception,), {})(f"I/O error: {NO_SPACE}"),
            *(UserError, f"cannot be written .*{NO_SPACE}"),
        ),
    ],
)
def test_nothing_changes_after_an_error(
    error: BaseException, raised: type[BaseException], words: str, earlier: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "a" / "b"
    if earlier:
        earlier_output(folder)
    before = everything_in(tmp_path)
    with pytest.raises(raised, match=words), staged(folder, overwrite=earlier) as temporary:
        (temporary / "file").write_text("half")
        raise error
    assert everything_in(tmp_path) == before


def test_a_folder_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with (
        pytest.raises(UserError, match="cannot be written"),
        staged(folder, overwrite=False),
    ):
        earlier_output(folder)
    assert everything_in(tmp_path) == {"a", f"a/{REPORT_FILE}", "a/old"}
