"""Exit codes of the command and of the scripts, and what they print when they stop early.

0: done. 2: an error that the user can fix, printed as one line on stderr. 130: interrupted with
Ctrl-C. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from rfprune.errors import OtherProcessError, UserError

DONE = 0
USER_ERROR = 2
INTERRUPTED = 130

RESUMABLE = "run the same command again to resume."
NOTHING_WRITTEN = "nothing was written."

GRACE_SECONDS = 10
"""Time for the process that reports an error: launchers stop all processes when one ends."""

Arguments = ParamSpec("Arguments")


def script(after_interrupt: str) -> Callable[[Callable[Arguments, int]], Callable[Arguments, int]]:
    """Decorate the main function of a script: it returns an exit code instead of raising.

    Python looks for modules in the folder of the script that it runs. That folder is removed from
    the path, since its evaluate.py would hide the library of that name.

    Args:
        after_interrupt: printed after Ctrl-C: what became of the work, such as `RESUMABLE`.
    """

    def decorate(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
        path = Path(main.__code__.co_filename).resolve()
        if main.__module__ == "__main__":
            sys.path[:] = [one for one in sys.path if Path(one).resolve() != path.parent]

        @wraps(main)
        def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
            return exit_code_of(path.stem, lambda: main(*args, **kwargs), after_interrupt)

        return wrapped

    return decorate


def exit_code_of(program: str, work: Callable[[], int], after_interrupt: str) -> int:
    """Run `work` and return its exit code; user errors and Ctrl-C print one line on stderr.

    Args:
        program: the name that starts the line.
        after_interrupt: see `script`.
    """
    try:
        return work()
    except OtherProcessError:
        return _exit_silently()
    except UserError as error:
        if not (error.on_one_process or _is_first_process()):
            return _exit_silently()
        sys.stderr.write(f"{program}: error: {one_sentence(error)}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        if _is_first_process():
            sys.stderr.write(_interrupted(program, after_interrupt))
        return INTERRUPTED


def one_sentence(error: UserError) -> str:
    """One line with a capital and a full stop; control characters are escaped for the terminal."""
    text = " ".join(str(error).split()).removesuffix(".")
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return f"{text[:1].upper()}{text[1:]}."


@contextmanager
def exit_on_interrupt(program: str, after_interrupt: str) -> Iterator[None]:
    """End the process at once on Ctrl-C, for imports: there is nothing to clean up yet.

    Some libraries catch every exception during their imports: a KeyboardInterrupt would get lost,
    or end as a missing module.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: Any) -> None:
        os.write(2, _interrupted(program, after_interrupt).encode())
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted(program: str, after_interrupt: str) -> str:
    return f"{program}: interrupted; {after_interrupt}\n"


def _exit_silently() -> int:
    """Leave the message to the process that met the error first."""
    time.sleep(GRACE_SECONDS)
    return USER_ERROR


def _is_first_process() -> bool:
    """Under a launcher every process meets the same error: only the first prints it."""
    return os.environ.get("RANK", "0") == "0"
