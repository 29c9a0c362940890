"""Exit codes: without these tests a user error or Ctrl-C could end in a traceback or in code 1."""

from __future__ import annotations

import pytest

from rfprune.cli import exit_codes
from rfprune.cli.exit_codes import DONE, INTERRUPTED, NOTHING_WRITTEN, USER_ERROR, script
from rfprune.errors import OtherProcessError, UserError

PROGRAM = "test_exit_codes"


@script(NOTHING_WRITTEN)
def main(error: BaseException | None = None) -> int:
    if error is not None:
        raise error
    return DONE


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (None, DONE, ""),
        (UserError("the model is\n  not one"), USER_ERROR, "error: The model is not one."),
        (UserError("Red \x1b[1m text."), USER_ERROR, r"error: Red \x1b[1m text."),
        (KeyboardInterrupt(), INTERRUPTED, f"interrupted; {NOTHING_WRITTEN}"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_script_ends_with_a_code_and_one_line(
    error: BaseException | None, code: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(error) == code
    assert capsys.readouterr().err == (f"{PROGRAM}: {printed}\n" if printed else "")


def test_one_of_several_processes_prints_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exit_codes, "GRACE_SECONDS", 0)
    monkeypatch.setenv("RANK", "1")
    assert main(UserError("all processes meet this")) == USER_ERROR
    assert main(OtherProcessError()) == USER_ERROR
    assert main(KeyboardInterrupt()) == INTERRUPTED
    assert capsys.readouterr().err == ""
    alone = UserError("only this process meets it")
    alone.on_one_process = True
    assert main(alone) == USER_ERROR
    assert "Only this process" in capsys.readouterr().err
