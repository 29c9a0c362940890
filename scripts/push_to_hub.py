"""Upload the output folder of an earlier run to the Hugging Face hub, in one commit.

python scripts/push_to_hub.py outputs/demo/sst2/mac-0.5/seed-0 USER/NAME [--private] [--dry-run]

Files that are there already are not sent again, so a failed push can be resumed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.hub.upload import (
    check_access,
    check_folder,
    check_repository,
    describe_push,
    push,
)


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    check_repository(options.repository)
    check_folder(options.folder)
    if options.dry_run:
        print(describe_push(options.folder, options.repository, private=options.private))
        return 0
    check_access()
    address = push(
        options.folder,
        options.repository,
        private=options.private,
        progress=sys.stderr.isatty(),
    )
    print(f"Pushed '{options.folder}' to {address}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the output folder of a run")
    parser.add_argument("repository", metavar="REPO", help="USER/NAME, or NAME of your own")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")
    return parser


if __name__ == "__main__":
    sys.exit(main())
