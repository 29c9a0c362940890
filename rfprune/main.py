"""python -m rfprune.main, and the console script `rfprune`.

Exit codes: 0 done, 2 something the user can mend (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rfprune.command_line import parse
from rfprune.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these flags (default: those of the process); gives the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        options = parse(arguments)
        from rfprune.run import run  # only now: torch takes seconds to import

        run(options, arguments)
    except UserError as error:
        sys.stderr.write(f"rfprune: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("rfprune: interrupted; nothing half-written was left behind.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
