"""The flags of the command, made from `rfprune.settings`, and their values as `Options`.

Everything that can be checked without torch is checked here.
"""

from __future__ import annotations

import argparse
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, get_args, get_type_hints

from rfprune.cli.validation import (
    check_data,
    check_exports,
    check_hub,
    check_task,
    check_writing,
)
from rfprune.errors import UserError
from rfprune.report.output_folder import check_output
from rfprune.settings import Allowed, Declaration, Options, Settings, flag_of
from rfprune.tasks.registry import (
    BLOCK_TOKENS,
    LANGUAGE_MODELING,
    OWN_DATA,
    SEQ2SEQ,
    TASKS,
    default_batch_size,
    default_samples,
)

_EPILOG = """\
examples:
  rfprune --model demo --task sst2 --constraint 0.5
  rfprune --model bert-base --task mrpc --constraint 0.5
  rfprune --model path/to/checkpoint --task mrpc --data-dir path/to/data --constraint 0.7 0.5 0.3
  rfprune --model bert-base --task mrpc --max-drop 1
  rfprune --model path/to/checkpoint --task custom --data-dir path/to/data --text-columns review \\
      --label-column verdict --constraint 0.5
"""

_NAMES_IN_HELP = {
    "tasks": ", ".join(TASKS),
    "own_data": ", ".join(OWN_DATA),
    "samples": default_samples(""),
    "language_samples": default_samples(LANGUAGE_MODELING),
    "batch_size": default_batch_size(""),
    "language_batch_size": default_batch_size(LANGUAGE_MODELING),
    "seq2seq_samples": default_samples(SEQ2SEQ),
    "seq2seq_batch_size": default_batch_size(SEQ2SEQ),
    "block_tokens": BLOCK_TOKENS,
}

Reader = Callable[[str], Any]


def parse(argv: Sequence[str]) -> Options:
    """Read the flags.

    Raises:
        UserError: a flag is unknown or missing, or its value is not allowed.
    """
    given = vars(_parser().parse_args(argv))
    task = given["task"]
    check_task(task)
    given.setdefault("samples", default_samples(task))
    given.setdefault("batch_size", default_batch_size(task))
    options = Options(**{subject.name: _subject(subject, given) for subject in fields(Options)})
    data = options.data
    check_data(task, data.data_dir, data.text_columns, data.label_column, data.validation_fraction)
    check_writing(task, options.writing)
    check_hub(options.hub)
    check_exports(options.output.export, quantize=options.output.quantize)
    for ratio in options.target.ratios:
        check_output(
            options.output_folder(ratio),
            overwrite=options.output.overwrite,
            flags=options.identity(ratio),
        )
    return options


def _subject(subject: Field[Any], given: Mapping[str, Any]) -> Any:
    """One part of the options, from the flags that were given."""
    kind = _type_of(Options, subject.name)
    values = {choice.name: given[choice.name] for choice in fields(kind) if choice.name in given}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Settings.from_flags(values) if kind is Settings else kind(**values)


class _Parser(argparse.ArgumentParser):
    """Raises a UserError, where argparse would print the usage text and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see rfprune --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rfprune",
        description="Prune heads and FFN neurons of a fine-tuned Transformer, without retraining.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # so that an absent flag leaves the declared default
    )
    parser.add_argument("--version", action="version", version=f"rfprune {version('rfprune')}")
    for subject in fields(Options):
        group = parser.add_argument_group(subject.metadata["title"])
        add_flags(group, _type_of(Options, subject.name))
    return parser


def add_flags(
    parser: argparse._ActionsContainer, subject: type[Any], names: Collection[str] | None = None
) -> None:
    """Add the flags of one of the dataclasses of `rfprune.settings`.

    Args:
        parser: a parser, or a group of one.
        names: only these fields; default: all.

    Absent flags have the declared default, or are left out if the parser's `argument_default` is
    `argparse.SUPPRESS`.
    """
    wanted = [choice for choice in fields(subject) if names is None or choice.name in names]
    first_of_two = {choice.metadata["declaration"].alternative_to for choice in wanted}
    exclusive: dict[str, argparse._ActionsContainer] = {}
    for choice in wanted:
        declaration: Declaration = choice.metadata["declaration"]
        container = exclusive.get(declaration.alternative_to, parser)
        if choice.name in first_of_two:
            container = parser.add_mutually_exclusive_group(required=declaration.required)
            exclusive[choice.name] = container
        argument = _argument(subject, choice, declaration)
        if declaration.required and container is parser:
            argument["required"] = True
        if parser.argument_default is not argparse.SUPPRESS and choice.default is not MISSING:
            argument["default"] = choice.default
        container.add_argument(flag_of(subject, choice.name), dest=choice.name, **argument)


def _argument(subject: type[Any], choice: Field[Any], declaration: Declaration) -> dict[str, Any]:
    """The arguments of argparse for a flag."""
    kind = _type_of(subject, choice.name)
    shown = declaration.help.format(**_NAMES_IN_HELP)
    if kind is bool:
        return {"action": "store_false" if choice.default is True else "store_true", "help": shown}
    if choice.default not in (MISSING, None, (), "") and "(default:" not in shown:
        shown += f" (default: {choice.default})"
    argument: dict[str, Any] = {"help": shown, "metavar": declaration.metavar}
    if get_args(kind):  # a tuple of any length
        argument["nargs"] = "+"
        argument["action"] = "extend" if declaration.repeatable else "store"
        kind = get_args(kind)[0]
    if declaration.without_value:
        argument |= {"nargs": "?", "const": declaration.without_value}
    if declaration.choices:
        argument["choices"] = declaration.choices
    return {**argument, "type": _reader(flag_of(subject, choice.name), kind, declaration)}


def _type_of(subject: type[Any], name: str) -> Any:
    """The type of a field, without None."""
    kind = get_type_hints(subject)[name]
    known = [one for one in get_args(kind) if one is not type(None)]
    return known[0] if isinstance(kind, UnionType) else kind


def _reader(flag: str, kind: Any, declaration: Declaration) -> Reader:
    """The function that turns the text of a flag into its value."""
    if kind is Path:
        return lambda text: _path(flag, text)
    if declaration.is_path:
        return lambda text: _name_or_path(flag, text)
    if (allowed := declaration.allowed) is not None:
        return lambda text: _allowed(flag, text, kind, allowed)
    return kind  # type: ignore[no-any-return]


def _allowed(flag: str, text: str, kind: Any, allowed: Allowed) -> Any:
    """The value of a flag, a name or a number."""
    try:
        value = text if kind is str else kind(text) + 0  # turns -0.0 into 0.0
    except ValueError:
        value = None
    if value is None or not allowed.test(value):
        raise UserError(f"{flag} {text or repr(text)} is not {allowed.description}")
    return value


def _path(flag: str, text: str) -> Path:
    """A path; ~ is expanded, since shells do not do so in --flag=~/folder."""
    if not text.strip():
        raise UserError(f"{flag} is empty: give a name or a path")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in text):
        raise UserError(
            f"{flag} {ascii(text)[:80]} has control characters or invalid bytes: rename it"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{flag} {text[:60]!r} is in a home directory that does not exist: give another path"
        ) from error


def _name_or_path(flag: str, text: str) -> str:
    """A hub id, an alias or a path, as it was given."""
    try:
        _path(flag, text).exists()
    except OSError as error:  # such as a name that is too long
        raise UserError(
            f"{flag} {text[:60]!r}... is not a valid path ({error.strerror}): give another name"
        ) from error
    return text
