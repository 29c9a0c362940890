"""The flags that say how units are chosen, and what is done to those that stay."""

from __future__ import annotations

import argparse
from typing import Any

from rfprune.cli import flag_values as value
from rfprune.errors import UserError
from rfprune.settings import (
    ALLOCATIONS,
    CRITERIA,
    GRADIENTS,
    METHODS,
    MOST_ROUNDS,
    MULTIPLES,
    TEACHERS,
    WEIGHT_CRITERIA,
)

DEFAULT_MULTIPLE = MULTIPLES[0]
"""The others are for comparing with what was published, where any number is kept."""


def add_method(parser: argparse.ArgumentParser) -> None:
    """Add the flags, a group of their own."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method",
        choices=METHODS,
        help="curvature: error curves, exact allocation, refitted projections; kwon: Kwon et al. "
        "2022, as published; importance: a classical criterion, refitted projections "
        f"(default: {METHODS[0]})",
    )
    group.add_argument(
        "--importance",
        choices=CRITERIA,
        help=f"the criterion of --method importance, which it implies (default: {CRITERIA[0]})",
    )
    group.add_argument(
        "--allocation",
        choices=ALLOCATIONS,
        help="of --method importance, which it implies; global: the most important units wherever "
        "they are; uniform: the same fraction of every sublayer (default: global)",
    )
    group.add_argument(
        "--use-labels", action="store_true", help="importance from labels, not from predictions"
    )
    group.add_argument(
        "--gradients",
        choices=GRADIENTS,
        default="per-example",
        help="of kwon; per-batch is what the authors' code does (default: per-example)",
    )
    group.add_argument(
        "--teacher",
        choices=TEACHERS,
        default="dense",
        help="of kwon; whom tuning imitates: the original, or, as the authors' code, the model "
        "masked at the square root of the constraint (default: dense)",
    )
    group.add_argument(
        "--skip-rearrange", action="store_true", help="of kwon; leave out the rearrangement"
    )
    group.add_argument("--skip-tune", action="store_true", help="leave out the least squares")
    group.add_argument(
        "--uniform",
        action="store_true",
        help="the same number of heads and of neurons in every layer: a plain architecture, which "
        "loads without any code of ours",
    )
    group.add_argument(
        "--round-to",
        type=int,
        choices=(1, *MULTIPLES),
        metavar="N",
        help="keep neurons in multiples of 8, 16, 32 or 64, which hardware likes: an odd number of "
        f"them can take several times as long; 1: any number (default: {DEFAULT_MULTIPLE}, and 1 "
        f"for other methods than {METHODS[0]})",
    )
    group.add_argument(
        "--rounds",
        type=value.whole_number("--rounds", 1, MOST_ROUNDS),
        default=1,
        metavar="N",
        help="prune in so many steps, looking afresh at what is left after each (default: 1)",
    )


def with_method(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags with the method that they imply; one that it does not know would do nothing.

    Raises:
        UserError: flags do not go together; the sentence says which.
    """
    implied = "importance" if flags["importance"] or flags["allocation"] else METHODS[0]
    method = flags["method"] or implied
    given = {
        "--gradients per-batch": ("kwon", flags["gradients"] == "per-batch"),
        "--teacher scheduled": ("kwon", flags["teacher"] == "scheduled"),
        "--skip-rearrange": ("kwon", flags["skip_rearrange"]),
        f"--importance {flags['importance']}": ("importance", flags["importance"]),
        f"--allocation {flags['allocation']}": ("importance", flags["allocation"]),
    }
    for flag, (owner, is_given) in given.items():
        if is_given and method != owner:
            raise UserError(
                f"{flag} belongs to --method {owner} and does nothing for {method}: leave it out, "
                f"or choose --method {owner}."
            )
    if flags["use_labels"] and flags["importance"] in WEIGHT_CRITERIA:
        raise UserError(
            f"--use-labels does nothing for --importance {flags['importance']}, which looks at no "
            f"loss: leave it out."
        )
    _check_uniform(flags)
    multiple = flags["round_to"] or (DEFAULT_MULTIPLE if method == METHODS[0] else 1)
    return {
        **flags,
        "method": method,
        "round_to": None if multiple == 1 else multiple,
        "importance": flags["importance"] or CRITERIA[0],
        "allocation": flags["allocation"] or ALLOCATIONS[0],
    }


def _check_uniform(flags: dict[str, Any]) -> None:
    if not flags["uniform"]:
        return
    if flags["allocation"] == "uniform":
        raise UserError(
            "--allocation uniform keeps the same fraction everywhere, and --uniform chooses sizes "
            "itself: leave one of them out."
        )
    if "dense" in flags["export"]:
        raise UserError(
            "--export dense is for tools that run no code from a checkpoint, and --uniform has "
            "none: leave --export dense out."
        )
