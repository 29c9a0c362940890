"""python -m rfprune.main, and the console script `rfprune`; exit codes: see `cli.exit_codes`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rfprune.cli.exit_codes import DONE, exit_code_of, exit_on_interrupt

if TYPE_CHECKING:
    from rfprune.settings import Options

_PROGRAM = "rfprune"
_AFTER_INTERRUPT = "no partial output was left behind."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: the flags; default: those of the process.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)

    def work() -> int:
        options = _parse(arguments)
        _import_run()(options, arguments)
        return DONE

    return exit_code_of(_PROGRAM, work, _AFTER_INTERRUPT)


def _parse(arguments: Sequence[str]) -> Options:
    with exit_on_interrupt(_PROGRAM, _AFTER_INTERRUPT):
        from rfprune.cli.parser import parse
    return parse(arguments)


def _import_run() -> Callable[[Options, Sequence[str]], None]:
    """Import torch and the other slow libraries, after the flags were found to be valid."""
    if "RANK" in os.environ:  # else torch logs every connection that ends with a process
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with exit_on_interrupt(_PROGRAM, _AFTER_INTERRUPT):
        import datasets  # noqa: F401  (first used in the middle of a run)

        from rfprune.cli.run import run
    return run


if __name__ == "__main__":
    sys.exit(main())
