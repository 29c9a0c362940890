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


def test_a_finished_folder_takes_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    check_output(folder, overwrite=False)
    assert everything_in(tmp_path) == set(), "the check leaves nothing"
    with staged(folder, overwrite=False) as temporary:
        (temporary / "file").write_text("done")
        assert not folder.exists()
    assert everything_in(tmp_path) == {"a", "a/b", "a/b/file"}


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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bug")])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: BaseException) -> None:
    with (
        pytest.raises(type(error)),
        staged(tmp_path / "a" / "b", overwrite=False) as temporary,
    ):
        (temporary / "file").write_text("half")
        raise error
    assert everything_in(tmp_path) == set()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        type("SafetensorError", (Exception,), {})("I/O error: No space left on device"),
    ],
)
def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    folder = earlier_output(tmp_path / "a")
    before = everything_in(tmp_path)
    with (
        pytest.raises(UserError, match="cannot be written .*No space left on device"),
        staged(folder, overwrite=True) as temporary,
    ):
        (temporary / "file").write_text("half")
        raise error
    assert everything_in(tmp_path) == before


def test_overwrite_replaces_an_output_of_ours_whole(tmp_path: Path) -> None:
    folder = earlier_output(tmp_path / "a")
    check_output(folder, overwrite=True)
    with staged(folder, overwrite=True) as temporary:
        (temporary / "new").write_text("new")
    assert everything_in(tmp_path) == {"a", "a/new"}


def test_a_folder_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with (
        pytest.raises(UserError, match="cannot be written"),
        staged(folder, overwrite=False),
    ):
        earlier_output(folder)
    assert everything_in(tmp_path) == {"a", f"a/{REPORT_FILE}", "a/old"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    check_output(folder, overwrite=False)
    with staged(folder, overwrite=False) as temporary:
        (temporary / "file").write_text("done")
    assert everything_in(folder) == {"file"}


@pytest.mark.parametrize(
    ("name", "overwrite", "message"),
    [
        ("earlier", False, "earlier.*exists already.*--overwrite"),
        ("foreign", True, f"foreign.*no {REPORT_FILE}.*--output-dir"),
        ("file", True, "file' is a file.*--output-dir"),
        ("file/further/down", True, "file' is a file.*--output-dir"),
        *((name, True, "give the name of a new folder") for name in (".", "..", "/", "out/..")),
        *((f"link-to-{name}", True, "is a link.*--output-dir") for name in ("nowhere", "earlier")),
        ("a" * 300, False, "not writable .File name too long.*--output-dir"),
    ],
)
def test_a_wrong_folder_is_an_error_before_the_run(
    name: str, overwrite: bool, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this check the error would come after all the work."""
    monkeypatch.chdir(tmp_path)
    earlier_output(Path("earlier"))
    Path("foreign").mkdir()
    for file in ("foreign/thesis.tex", "file"):
        Path(file).write_text("years of work")
    for target in ("nowhere", "earlier"):
        Path(f"link-to-{target}").symlink_to(target)
    before = everything_in(tmp_path)
    with pytest.raises(UserError, match=message):
        check_output(Path(name), overwrite=overwrite)
    assert everything_in(tmp_path) == before


def test_the_longest_possible_name_works(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 255)
    check_output(folder, overwrite=False)
    for content in ("first", "second"):
        with staged(folder, overwrite=True) as temporary:
            (temporary / "file").write_text(content)
    assert (folder / "file").read_text() == "second"
    assert everything_in(tmp_path) == {folder.name, f"{folder.name}/file"}


def test_a_folder_without_write_permission_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="not writable .Permission denied."):
        check_output(tmp_path / "a", overwrite=False)
