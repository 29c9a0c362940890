"""The flags that put an output on the hub; name and token are looked at before the work."""

from __future__ import annotations

import argparse

from rfprune.errors import UserError


def add_hub(parser: argparse.ArgumentParser) -> None:
    """Add the flags, a group of their own."""
    group = parser.add_argument_group("hub")
    group.add_argument(
        "--push-to-hub", metavar="REPO", help="upload the output to USER/NAME on the hub"
    )
    group.add_argument("--private", action="store_true", help="nobody else sees the repository")
    group.add_argument(
        "--hub-dry-run", action="store_true", help="upload nothing, say what would be uploaded"
    )


def check_hub(repository: str | None, *, private: bool, dry_run: bool, models: int) -> None:
    """See that a push can begin.

    Args:
        models: how many the command makes.

    Raises:
        UserError: it cannot, or flags do nothing.
    """
    if repository is None:
        if private or dry_run:
            flag = "--private" if private else "--hub-dry-run"
            raise UserError(f"{flag} does nothing without --push-to-hub REPO: add it.")
        return
    from rfprune.hub.upload import check_access, check_repository

    check_repository(repository)
    if models > 1:
        raise UserError(
            "--push-to-hub takes one model, but several constraints make several: push each "
            "afterwards with scripts/push_to_hub.py."
        )
    if not dry_run:
        check_access()
