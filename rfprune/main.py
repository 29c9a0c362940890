"""python -m rfprune.main, and the console script `rfprune`.

Exit codes: 0 done, 2 something the user can mend (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rfprune.errors import OtherProcessError, UserError

if TYPE_CHECKING:
    from rfprune.settings import Options

INTERRUPTED = 130
COURTESY_SECONDS = 10
_FAREWELL = "rfprune: interrupted; nothing half-written was left behind.\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these flags (default: those of the process); gives the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        options = _parse(arguments)
        _import_run()(options, arguments)
    except OtherProcessError:
        return _follow()
    except UserError as error:
        if not (error.on_one_process or _is_first_process()):
            return _follow()
        sys.stderr.write(f"rfprune: error: {_sentence(error)}\n")
        return 2
    except KeyboardInterrupt:
        if _is_first_process():
            sys.stderr.write(_FAREWELL)
        return INTERRUPTED
    return 0


def _follow() -> int:
    """End in silence after the process that says why: launchers stop all when one has ended."""
    time.sleep(COURTESY_SECONDS)
    return 2


def _is_first_process() -> bool:
    """Of those that a launcher has started: what all of them meet, one says."""
    return os.environ.get("RANK", "0") == "0"


def _sentence(error: UserError) -> str:
    """One line, one capital, one full stop: the Python API says the same without the last two.

    What a file holds may end up in it: no sign of it reaches the terminal that would change that.
    """
    text = " ".join(str(error).split()).removesuffix(".")
    text = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
    return f"{text[:1].upper()}{text[1:]}."


def _parse(arguments: Sequence[str]) -> Options:
    """Import late even what is quick: from the first moment on Ctrl-C shows no traceback."""
    with _exit_when_interrupted():
        from rfprune.cli.parser import parse
    return parse(arguments)


def _import_run() -> Callable[[Options, Sequence[str]], None]:
    """Import what takes seconds, only now that the flags are known to be good."""
    if "RANK" in os.environ:  # else torch tells of every connection that ends with a process
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with _exit_when_interrupted():
        import datasets  # noqa: F401  (first used in the middle of a run; see above)

        from rfprune.cli.run import run
    return run


@contextmanager
def _exit_when_interrupted() -> Iterator[None]:
    """Let Ctrl-C end the process on the spot, while there is nothing to clean up.

    The libraries' imports catch whatever is raised in them: as an exception, an interruption
    would be swallowed, or come out as a missing module.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: Any) -> None:
        os.write(2, _FAREWELL.encode())
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
