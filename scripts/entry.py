"""How the scripts here answer when they do not finish: what they say, and their exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec

from rfprune.errors import UserError

Flags = ParamSpec("Flags")

GOES_ON = "the same command goes on from here."
NOTHING = "nothing was written."


def script(stopped: str) -> Callable[[Callable[Flags, int]], Callable[Flags, int]]:
    """Give a main function its answers: a user's error is one sentence and 2, Ctrl-C is 130.

    Args:
        stopped: what has become of the work when somebody interrupts it.
    """

    def wrapped(main: Callable[Flags, int]) -> Callable[Flags, int]:
        program = Path(main.__code__.co_filename).stem

        @wraps(main)
        def answering(*args: Flags.args, **kwargs: Flags.kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except UserError as error:
                sys.stderr.write(f"{program}: error: {error}\n")
                return 2
            except KeyboardInterrupt:
                sys.stderr.write(f"{program}: interrupted; {stopped}\n")
                return 130

        return answering

    return wrapped
