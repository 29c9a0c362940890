"""Every choice of a run, declared once: name, type, default, allowed values, flag and help text.

A choice is a field of one of the dataclasses below. The flags of the command, their help and their
checks are made from these fields (`rfprune.cli.parser`), so a new choice is one new field here.
`Settings` is what `rfprune.prune` takes; `Options` holds all choices of the command.

No torch here: `rfprune --help` answers at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from pathlib import Path
from textwrap import fill
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from rfprune.errors import UserError

METHODS = ("curvature", "kwon", "importance")
CRITERIA = ("fisher", "taylor", "gradient", "magnitude-l2", "magnitude-l1", "random")
WEIGHT_CRITERIA = CRITERIA[3:]
"""Criteria that are computed without a loss."""

ALLOCATIONS = ("global", "uniform")
GRADIENTS = ("per-example", "per-batch")
TEACHERS = ("dense", "scheduled")
SPARSITY_CRITERIA = ("obs", "wanda", "magnitude")
SPARSITY_SCOPES = ("layer", "global")
METRICS = ("mac", "params", "memory", "latency")
MULTIPLES = (8, 16, 32, 64)
MAX_ROUNDS = 16
DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("cpu", "disk")
EXPORTS = ("dense", "onnx", "openvino", "gguf")
QUANTIZED_EXPORTS = ("onnx", "openvino")
"""Formats that --quantize writes with int8 weights, too."""

GGUF_TYPES = ("f16", "q8_0", "q4_0")
TEXT_SCORES = ("chrf", "bleu", "rougeL")
MAX_NEW_TOKENS = 128
"""Maximum number of generated tokens, if neither flag nor checkpoint sets it."""

MAX_SEED = 2**63 - 1  # torch accepts no larger one

_OF_UNITS = (
    *("metric", "method", "importance", "allocation", "gradients", "teacher", "rearrange", "tune"),
    *("uniform", "depth", "rounds", "protect", "min_heads", "min_neurons", "score_stages"),
)
"""Choices about the heads and neurons that are removed."""

_OF_SIZES = (
    *("allocation", "teacher", "uniform", "depth", "rounds"),
    *("protect", "min_heads", "min_neurons"),
)
"""Choices about the number of units that each layer keeps, or that need a constraint."""

_SUBLAYERS = "heads|cross_heads|neurons"
PROTECTED = (
    rf"layer\.(?P<first>-?\d+)(-(?P<last>\d+))?(\.(?P<sublayer>{_SUBLAYERS}))?"
    rf"|(?P<alone>{_SUBLAYERS})"
)
"""Names of layers and sublayers: layer.0, layer.-1, layer.0-3, layer.0.heads, heads."""

_BY_METHOD: Any = "by method"
"""The default of `round_to`: multiples of 8 for curvature. The other methods are there to compare
with what was published, where any number of neurons is kept."""


@dataclass(frozen=True)
class Allowed:
    """The values that a number may have: completes the sentence "... is not"."""

    description: str
    test: Callable[[Any], bool]


def whole_number(minimum: int, maximum: int | None = None) -> Allowed:
    """Whole numbers from `minimum` to `maximum`, both included."""
    if maximum is None:
        return Allowed(f"a whole number of at least {minimum}", lambda number: number >= minimum)
    return Allowed(
        f"a whole number from {minimum} to {maximum}", lambda number: minimum <= number <= maximum
    )


FRACTION = Allowed(
    "a number between 0 and 1 (both excluded): it is the fraction of the original cost to keep, "
    "such as 0.5",
    lambda number: 0 < number < 1,
)
HELD_OUT = Allowed(
    "a number between 0 and 1 (both excluded): it is the fraction of the rows that become "
    "validation data, such as 0.2",
    lambda number: 0 < number < 1,
)
SPLIT_NAME = Allowed(
    "the name of a split: letters, digits, _, - and ., such as dev for the file dev.csv",
    lambda name: re.fullmatch(r"\w[\w.-]*", name) is not None,
)
PROTECTED_NAME = Allowed(
    "a layer or sublayer: layer.0 (layer.-1 is the last), layer.0-3, layer.0.heads, or heads, "
    "neurons or cross_heads of all layers",
    lambda name: isinstance(name, str) and re.fullmatch(PROTECTED, name) is not None,
)
DEPTH = Allowed(
    "off, layers, joint, or how many layers to remove, such as 4",
    lambda text: text in ("off", "layers", "joint") or (text.isdecimal() and int(text) > 0),
)
POINTS = Allowed(
    "a number from 0 up to 100: it is how many points of the task's score may be lost, such as 1",
    lambda number: 0 <= number < 100,
)


def parse_sparsity(text: str) -> float | tuple[int, int] | None:
    """The fraction of zeros, or (N, M) for at most N non-zeros of M; None for anything else."""
    if found := re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", text):
        kept, size = int(found[1]), int(found[2])
        return (kept, size) if kept < size else None
    try:
        fraction = float(text)
    except ValueError:
        return None
    return fraction if 0 < fraction < 1 else None


SPARSITY = Allowed(
    "a fraction of zeros between 0 and 1 (both excluded), such as 0.5, or N:M for at most N "
    "non-zeros of every M weights, such as 2:4",
    lambda text: parse_sparsity(text) is not None,
)


def num_bytes(size: str) -> int | None:
    """The bytes of a size such as 4GB, 1.5 GiB or 800MB; None for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)(i?)B", size.strip())
    if match is None:
        return None
    number, prefix, binary = match.groups()
    unit = 1024 if binary else 1000
    return int(float(number) * unit ** " kMGT".index(prefix or " "))


BYTES = Allowed(
    "a size of memory: a number and kB, MB, GB, kiB, MiB or GiB, such as 4GB or 1.5GiB",
    lambda size: bool(num_bytes(size)),
)


@dataclass(frozen=True)
class Declaration:
    """What a field declares besides its name, type and default.

    Attributes:
        help: the text of --help. Names in braces are filled in by the parser.
        flag: the flag, where it is not the field's name; a flag of a field that is True by default
            turns it off.
        metavar: what --help calls the value.
        choices: all allowed values.
        allowed: the allowed numbers.
        is_path: a text that names a folder or file, or may do so.
        repeatable: values of a repeated flag are added; else the last flag counts.
        required: it or its alternative must be given.
        alternative_to: another field; at most one of the two can be given.
        method: the only method for which it does something.
        implies_method: giving it chooses that method.
        without_value: what the flag means without a value; it needs one if this is empty.
        changes_output: False if runs that differ in it have the same output.
    """

    help: str
    flag: str = ""
    metavar: str | None = None
    choices: tuple[Any, ...] = ()
    allowed: Allowed | None = None
    is_path: bool = False
    repeatable: bool = False
    required: bool = False
    alternative_to: str = ""
    method: str = ""
    implies_method: bool = False
    without_value: str = ""
    changes_output: bool = True

    def check(self, name: str, value: Any) -> None:
        """Raise a UserError unless the value is allowed; the message calls it `name`."""
        if self.choices and value not in self.choices:
            known = ", ".join(str(choice) for choice in self.choices)
            raise UserError(f"{name} {value!r} is unknown: choose one of {known}")
        if self.allowed is not None and not self.allowed.test(value):
            raise UserError(f"{name} {value} is not {self.allowed.description}")


def choice(help: str, *, default: Any = MISSING, **declared: Any) -> Any:  # noqa: A002
    """A field of one of the dataclasses below; see `Declaration`."""
    return field(default=default, metadata={"declaration": Declaration(help, **declared)})


def declarations(subject: type[Any]) -> Mapping[str, Declaration]:
    """What the fields of one of the dataclasses below declare, by name."""
    return {one.name: one.metadata["declaration"] for one in fields(subject)}


def flag_of(subject: type[Any], name: str) -> str:
    """The flag of a field, such as --data-dir."""
    return declarations(subject)[name].flag or "--" + name.replace("_", "-")


def declared_default(subject: type[Any], name: str) -> Any:
    """The default of a field."""
    return next(one.default for one in fields(subject) if one.name == name)


def _spelled(subject: type[Any], name: str, value: Any) -> str:
    """A choice as a flag and as an argument: --importance taylor (importance='taylor')."""
    flag = flag_of(subject, name)
    given = flag if isinstance(value, bool) else f"{flag} {value}"
    return f"{given} ({name}={value!r})"


def _check_values(settings: Any) -> None:
    """Check every field by its type and by what it declares."""
    types = get_type_hints(type(settings))
    for name, declaration in declarations(type(settings)).items():
        value = _of_type(types[name], declaration, name, getattr(settings, name))
        object.__setattr__(settings, name, value)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None:
                declaration.check(name, one)


_TYPE_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def _of_type(declared: Any, declaration: Declaration, name: str, value: Any) -> Any:
    """The value as its declared type has it; numbers of numpy become Python's.

    Raises:
        UserError: the value has another type.
    """
    options = get_args(declared) if isinstance(declared, UnionType) else (declared,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    if kind not in _TYPE_NAMES:  # paths and tuples, which the parser makes
        return value
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and value == value // 1:
        return int(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    known = ", ".join(str(choice) for choice in declaration.choices)
    raise UserError(
        f"{name} {value!r:.60} is not {_TYPE_NAMES[kind]}: "
        + (f"choose one of {known}" if known else "correct it, or leave it out")
    )


Subject = TypeVar("Subject", bound=type[Any])


def _documented(subject: Subject) -> Subject:
    """Put the help texts into the docstring, as its attributes."""
    summary, _, rest = str(subject.__doc__).partition("\n\n")
    attributes = ["    Attributes:"]
    for one in fields(subject):
        off = "if False, " if one.default is True else ""
        text = f"{one.name}: {off}{one.metadata['declaration'].help}"
        attributes.append(fill(text, 100, initial_indent=8 * " ", subsequent_indent=12 * " "))
    subject.__doc__ = "\n\n".join([summary, "\n".join(attributes), rest])
    return subject


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """What to prune, and how far."""

    model: str = choice(
        "a folder, a hub id, an alias such as bert-base, or demo (included; needs no network)",
        is_path=True,
        required=True,
    )
    task: str = choice(
        "{tasks}; custom: your own checkpoint and data; language-modeling: any text; similarity: "
        "embeddings; seq2seq: translations, summaries",
        required=True,
    )
    constraint: tuple[float, ...] = choice(
        "fraction of the original cost to keep, between 0 and 1; several values give several "
        "models",
        default=(),
        metavar="RATIO",
        allowed=FRACTION,
        changes_output=False,  # it is part of the output's own identity
    )
    sizes: Path | None = choice(
        "instead of --constraint: the heads and neurons that every layer keeps, as a JSON list of "
        '{{"heads": 3, "neurons": 400}} or the report.json of a run',
        default=None,
        metavar="FILE.json",
        alternative_to="constraint",
    )
    max_drop: float | None = choice(
        "instead of --constraint: find the smallest model that loses at most this many points (of "
        "100) of the task's score",
        default=None,
        metavar="POINTS",
        allowed=POINTS,
        alternative_to="constraint",
    )
    metric: str = choice(
        "the cost to reduce: MACs, parameters, bytes of weights, or latency measured on this "
        "device",
        default=METRICS[0],
        choices=METRICS,
    )
    vocabulary: tuple[Path, ...] = choice(
        "keep only the tokens that these texts (plain UTF-8, or tables), the calibration examples "
        "and the special tokens need; without --constraint nothing else is removed",
        default=(),
        metavar="FILE",
    )
    vocabulary_min_count: int = choice(
        "with --vocabulary: also remove tokens that occur less often in these texts",
        default=1,
        metavar="N",
        allowed=whole_number(1),
    )
    latency_table: Path | None = choice(
        "with --metric latency: a table made by scripts/profile_latency.py, used for its batch "
        "size and length (default: measured before pruning, on a typical batch)",
        default=None,
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "constraint", tuple(dict.fromkeys(self.constraint)))
        object.__setattr__(self, "vocabulary", tuple(dict.fromkeys(self.vocabulary)))
        _check_values(self)
        if self.vocabulary_min_count > 1 and not self.vocabulary:
            raise UserError(
                f"--vocabulary-min-count {self.vocabulary_min_count} does nothing without "
                "--vocabulary FILE: add it, or leave this out"
            )
        if self.vocabulary and self.max_drop is not None:
            raise UserError(
                "--vocabulary and --max-drop cannot be combined: trim the vocabulary first, then "
                "give its output as --model with --max-drop"
            )
        if self.latency_table is not None and self.metric != "latency":
            raise UserError(
                f"--latency-table does nothing for --metric {self.metric}: leave it out, or give "
                f"--metric latency"
            )

    @property
    def ratios(self) -> tuple[float | None, ...]:
        """The ratio of each model to make; None for the one that `max_drop` finds, for one of given
        sizes, and for one that keeps all units."""
        return self.constraint or (None,)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The data: where it is, and how much of it is used."""

    data_dir: Path | None = choice(
        "local data, as DIR/TASK/{{train,validation}}.{{parquet,csv,tsv,jsonl}}; your own data "
        "also without TASK/, as .txt for language-modeling, and images as "
        "DIR/{{train,validation}}/CLASS/*.png; with --validation-fraction also one file (default: "
        "data from the hub)",
        default=None,
        metavar="DIR",
    )
    validation_fraction: float | None = choice(
        "with --task {own_data}: hold out this fraction of the training rows, drawn with --seed, "
        "as validation data; for a --data-dir that is one file or has no validation split",
        default=None,
        metavar="FRACTION",
        allowed=HELD_OUT,
    )
    train_split: str | None = choice(
        "the split to calibrate on (default: train)",
        default=None,
        metavar="NAME",
        allowed=SPLIT_NAME,
    )
    validation_split: str | None = choice(
        "the split to score on, such as dev or test (default: validation)",
        default=None,
        metavar="NAME",
        allowed=SPLIT_NAME,
    )
    text_columns: tuple[str, ...] | None = choice(
        "with --task {own_data}: the column of the text, or the two columns of a pair (default: "
        "sentence1 and sentence2, sentence, or text; tokens; question; source, document, article "
        "or dialogue)",
        default=None,
        metavar="NAME",
    )
    label_column: str | None = choice(
        "with --task custom or similarity: the column of label ids or names, or of numbers for a "
        "regression; with --task seq2seq: of the target texts; optional in training data (default: "
        "label; ner_tags; score; target, summary or highlights)",
        default=None,
        metavar="NAME",
    )
    samples: int = choice(
        "number of calibration examples, drawn without replacement (default: {samples}; "
        "language-modeling: {language_samples}; seq2seq: {seq2seq_samples})",
        metavar="N",
        allowed=whole_number(1),
    )
    batch_size: int = choice(
        "examples per batch (default: {batch_size}; language-modeling: {language_batch_size}; "
        "seq2seq: {seq2seq_batch_size})",
        metavar="N",
        allowed=whole_number(1),
    )
    max_length: int | None = choice(
        "maximum number of tokens per example, or per source with --task seq2seq (default: that of "
        "the task; custom: 128; language-modeling, seq2seq: {block_tokens}, or the maximum of the "
        "model)",
        default=None,
        metavar="N",
        allowed=whole_number(8),
    )
    eval_limit: int | None = choice(
        "number of validation examples to score (default: all)",
        default=None,
        metavar="N",
        allowed=whole_number(1),
    )

    def __post_init__(self) -> None:
        _check_values(self)


@dataclass(frozen=True, kw_only=True)
class WritingSettings:
    """How an encoder-decoder generates texts, and how they are scored; only for task seq2seq."""

    score: str = choice(
        "the score of the texts; chrf and bleu for translations, rougeL for summaries",
        default=TEXT_SCORES[0],
        choices=TEXT_SCORES,
    )
    source_prefix: str = choice(
        "put this before every source, such as 'translate English to German: ' for T5",
        default="",
        metavar="TEXT",
    )
    max_new_tokens: int | None = choice(
        f"maximum number of generated tokens (default: as in generation_config.json, or "
        f"{MAX_NEW_TOKENS})",
        default=None,
        metavar="N",
        allowed=whole_number(1),
    )
    num_beams: int | None = choice(
        "number of beams; 1 is greedy and fastest (default: as in generation_config.json)",
        default=None,
        metavar="N",
        allowed=whole_number(1),
    )

    def __post_init__(self) -> None:
        _check_values(self)

    @property
    def given(self) -> tuple[str, ...]:
        """The flags whose values are not the defaults."""
        return tuple(
            flag_of(type(self), one.name)
            for one in fields(self)
            if getattr(self, one.name) != one.default
        )


@_documented
@dataclass(frozen=True)
class Settings:
    """The method of pruning. `round_to` becomes None if any number of neurons may be kept.

    Raises:
        UserError: a value is not allowed, does nothing for the method, or contradicts another.

    Example:
        >>> Settings(method="importance", importance="taylor").round_to is None
        True
        >>> Settings(rounds=2).round_to
        8
    """

    method: str = choice(
        "curvature: error curves, exact allocation, refitted projections; kwon: Kwon et al. 2022, "
        "as published; importance: a classical criterion, refitted projections",
        default=METHODS[0],
        choices=METHODS,
    )
    importance: str = choice(
        "the criterion of method importance; the flag implies that method",
        default=CRITERIA[0],
        choices=CRITERIA,
        method="importance",
        implies_method=True,
    )
    allocation: str = choice(
        "for method importance; global: keep the most important units of the whole model; uniform: "
        "keep the same fraction of every sublayer; the flag implies that method",
        default=ALLOCATIONS[0],
        choices=ALLOCATIONS,
        method="importance",
        implies_method=True,
    )
    use_labels: bool = choice(
        "compute importance from the loss on labels (default: from predictions, without labels)",
        default=False,
    )
    gradients: str = choice(
        "for method kwon: gradients per example, or per batch as in the authors' code",
        default=GRADIENTS[0],
        choices=GRADIENTS,
        method="kwon",
    )
    teacher: str = choice(
        "for method kwon: the reference model for tuning; dense: the original model; scheduled: "
        "the model masked at the square root of the constraint, as in the authors' code",
        default=TEACHERS[0],
        choices=TEACHERS,
        method="kwon",
    )
    rearrange: bool = choice(
        "skip the rearrangement of the masks (method kwon)",
        default=True,
        flag="--skip-rearrange",
        method="kwon",
    )
    tune: bool = choice(
        "skip the least-squares fit of the remaining weights", default=True, flag="--skip-tune"
    )
    uniform: bool = choice(
        "keep the same number of heads and the same number of neurons in every layer: the result "
        "is a plain architecture, which loads without rfprune's code",
        default=False,
    )
    depth: str = choice(
        "remove whole layers, for a plain and fast model; layers: as many as the constraint needs, "
        "and nothing else (with --uniform also the same sizes in all others); joint: some layers, "
        "then heads and neurons of the others; a number: that many layers, then heads and neurons; "
        "--depth alone means layers",
        default="off",
        metavar="LAYERS",
        allowed=DEPTH,
        without_value="layers",
    )
    round_to: int | None = choice(
        "keep neurons in multiples of 8, 16, 32 or 64, or 1 for any number; odd numbers can be "
        "several times slower on hardware (default: 8 for curvature, 1 for other methods)",
        default=_BY_METHOD,
        metavar="N",
        choices=(1, *MULTIPLES),
    )
    protect: tuple[str, ...] = choice(
        "layers and sublayers that stay whole: layer.0, layer.-1 (the last), layer.0-3, "
        "layer.0.heads, or heads (of all layers)",
        default=(),
        metavar="NAME",
        allowed=PROTECTED_NAME,
    )
    min_heads: int = choice(
        "minimum number of heads in every layer (with grouped queries: of key-value heads)",
        default=0,
        metavar="N",
        allowed=whole_number(0),
    )
    min_neurons: int = choice(
        "minimum number of FFN neurons in every layer",
        default=0,
        metavar="N",
        allowed=whole_number(0),
    )
    rounds: int = choice(
        "prune in this many steps; each step collects new statistics",
        default=1,
        metavar="N",
        allowed=whole_number(1, MAX_ROUNDS),
    )
    sparsity: str | float | None = choice(
        "also set weights within the layers to zero: a fraction such as 0.5, or 2:4 for at most 2 "
        "non-zeros of every 4 weights of a row; without --constraint all units stay",
        default=None,
        metavar="FRACTION|N:M",
        allowed=SPARSITY,
    )
    sparsity_criterion: str = choice(
        "with --sparsity: which weights become zero; obs: Optimal Brain Surgeon, which adjusts the "
        "remaining weights; wanda: the smallest weight times norm of its input; magnitude: the "
        "smallest weight",
        default=SPARSITY_CRITERIA[0],
        choices=SPARSITY_CRITERIA,
    )
    sparsity_scope: str = choice(
        "with --sparsity FRACTION; layer: the same fraction in every linear map; global: more "
        "zeros where they change the predictions less",
        default=SPARSITY_SCOPES[0],
        choices=SPARSITY_SCOPES,
    )
    seed: int = choice(
        "seed for drawing the calibration examples and for sampling",
        default=0,
        metavar="N",
        allowed=whole_number(0, MAX_SEED),
    )

    def __post_init__(self) -> None:
        depth: Any = self.depth
        if not isinstance(depth, str):  # a number of layers, or what the check refuses
            object.__setattr__(self, "depth", str(depth))
        sizes_are_given = self.round_to in MULTIPLES or self.allocation != ALLOCATIONS[0]
        if self.round_to == _BY_METHOD:
            multiple = MULTIPLES[0] if self.method == METHODS[0] else None
            object.__setattr__(self, "round_to", multiple)
        names: Any = self.protect
        names = (names,) if isinstance(names, str) else names
        if not isinstance(names, list | tuple):
            raise UserError(f"protect {names!r:.60} is not a list of names, such as ['layer.0']")
        object.__setattr__(self, "protect", tuple(dict.fromkeys(names)))
        given: Any = self.sparsity
        if isinstance(given, int | float) and not isinstance(given, bool):
            object.__setattr__(self, "sparsity", f"{float(given):g}")
        _check_values(self)
        self._check_sparsity()
        if self.round_to == 1:
            object.__setattr__(self, "round_to", None)
        self._check_depth(sizes_are_given=sizes_are_given)
        for one in fields(self):
            if getattr(self, one.name) != one.default:
                self._check_method_of(one.name)
        if self.use_labels and self.method == "importance" and self.importance in WEIGHT_CRITERIA:
            raise UserError(
                f"--use-labels does nothing for --importance {self.importance}, which uses no "
                f"loss: leave it out"
            )
        if self.protect and (self.uniform or self.allocation == "uniform"):
            same = "--uniform" if self.uniform else "--allocation uniform"
            raise UserError(
                f"{same} treats all layers alike, so --protect {self.protect[0]} would keep all of "
                "them whole: leave one of the two out"
            )
        if self.uniform and self.allocation == "uniform":
            raise UserError(
                "--allocation uniform keeps the same fraction everywhere, and --uniform chooses "
                "the sizes itself (allocation='uniform', uniform=True): leave one of them out"
            )

    @classmethod
    def from_flags(cls, given: Mapping[str, Any]) -> Settings:
        """The settings with the method that the given choices imply.

        Args:
            given: values by field name, only those that were given explicitly.

        Raises:
            UserError: as for `Settings`.
        """
        implied = [
            declaration.method
            for name, declaration in declarations(cls).items()
            if declaration.implies_method and name in given
        ]
        settings = cls(**{"method": (*implied, METHODS[0])[0], **given})
        for name, declaration in declarations(cls).items():
            if declaration.implies_method and name in given:
                settings._check_method_of(name)
        return settings

    def _check_sparsity(self) -> None:
        """Refuse choices of sparsity that do nothing."""
        for one in fields(self):
            needs_sparsity = one.name in ("sparsity_criterion", "sparsity_scope")
            if needs_sparsity and self.sparsity is None and getattr(self, one.name) != one.default:
                raise UserError(
                    f"{_spelled(type(self), one.name, getattr(self, one.name))} does nothing "
                    "without --sparsity: add it, or leave this out"
                )
        if self.sparsity_scope == "global" and ":" in str(self.sparsity):
            raise UserError(
                f"--sparsity {self.sparsity} fixes the density of every row, so --sparsity-scope "
                "global (sparsity_scope='global') does nothing: leave it out, or give a fraction"
            )

    def _check_depth(self, *, sizes_are_given: bool) -> None:
        """Refuse rounds, and choices about the sizes of layers where these stay as they are."""
        if self.depth == "off":
            return
        if self.rounds != 1:
            raise UserError(
                f"--depth {self.depth} chooses layers once, and {self._shown('rounds')} prunes in "
                "steps: leave one of them out"
            )
        floor = next((one for one in ("min_heads", "min_neurons") if getattr(self, one)), None)
        if floor is not None:
            raise UserError(
                f"{self._shown(floor)} applies to every layer, but --depth {self.depth} removes "
                f"whole layers: leave one of them out, or keep layers with --protect"
            )
        if self.depth == "layers" and sizes_are_given and not self.uniform:
            one = "round_to" if self.allocation == ALLOCATIONS[0] else "allocation"
            raise UserError(
                f"{self._shown(one)} sets the sizes of layers, which --depth layers "
                f"(depth='layers') does not change: leave it out, or choose --depth joint "
                f"(depth='joint')"
            )

    def _shown(self, name: str) -> str:
        """A choice as a flag and as an argument."""
        return _spelled(type(self), name, getattr(self, name))

    def _check_method_of(self, name: str) -> None:
        """Refuse a choice that does nothing for the method."""
        owner = declarations(type(self))[name].method
        if owner not in ("", self.method):
            raise UserError(
                f"{self._shown(name)} belongs to --method {owner} "
                f"and does nothing for {self.method}: leave it out, or choose --method {owner}"
            )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How the command runs: device, cache and console."""

    device: str | None = choice(
        "cpu, cuda, cuda:N or mps (default: the fastest available)", default=None
    )
    dtype: str | None = choice(
        "dtype of the weights (default: float32 in memory, the dtype of the checkpoint on disk)",
        default=None,
        choices=DTYPES,
    )
    offload: str | None = choice(
        "for a model larger than the memory of the device: keep its layers on the cpu or on disk "
        "(in the checkpoint's own files), load them one at a time, and offload the pruned model as "
        "well",
        default=None,
        choices=OFFLOADS,
        changes_output=False,
    )
    max_memory: str | None = choice(
        "memory limit, such as 4GB, for the process (with --device cuda: for the GPU); layers are "
        "offloaded if necessary, and a limit that is too small is refused before the run starts",
        default=None,
        metavar="SIZE",
        allowed=BYTES,
        changes_output=False,
    )
    cache_dir: Path | None = choice(
        "folder for statistics that other constraints can reuse (default: $RFPRUNE_CACHE, or "
        "~/.cache/rfprune)",
        default=None,
        metavar="DIR",
        changes_output=False,
    )
    cache: bool = choice(
        "neither read nor write cached statistics",
        default=True,
        flag="--no-cache",
        alternative_to="cache_dir",
        changes_output=False,
    )
    quiet: bool = choice("print nothing but errors", default=False, changes_output=False)
    verbose: bool = choice(
        "also print the warnings of other libraries", default=False, changes_output=False
    )

    def __post_init__(self) -> None:
        _check_values(self)
        if self.device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", self.device):
            raise UserError(f"Unknown device {self.device!r}: choose cpu, cuda, cuda:N or mps")
        if self.offload == "cpu" and self.device == "cpu":
            raise UserError(
                "--offload cpu does nothing for --device cpu, where the layers are anyway: leave "
                "it out, or give --offload disk"
            )


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What is written, and where."""

    output_dir: Path | None = choice(
        "output folder; with several constraints, one subfolder each (default: "
        "outputs/MODEL/TASK/METRIC-CONSTRAINT/seed-N, or METRIC-drop-POINTS)",
        default=None,
        metavar="DIR",
        changes_output=False,
    )
    overwrite: bool = choice("replace an earlier output", default=False, changes_output=False)
    export: tuple[str, ...] = choice(
        "also write other formats; dense: the original shapes, filled with zeros; onnx: an ONNX "
        "file for any batch size and length; openvino: an OpenVINO model, likewise; gguf: a file "
        "for llama.cpp (all but dense need the extra of the same name, such as rfprune[onnx])",
        default=(),
        choices=EXPORTS,
        repeatable=True,
    )
    quantize: bool = choice(
        "with --export onnx or openvino: also write a model with int8 weights", default=False
    )
    gguf_type: tuple[str, ...] = choice(
        "with --export gguf: the type of the weights; several values write several files (default: "
        "f16)",
        default=(),
        choices=GGUF_TYPES,
        repeatable=True,
    )
    score_stages: bool = choice(
        "also score the model before the remaining weights are fitted, for the report",
        default=False,
    )

    def __post_init__(self) -> None:
        for name in ("export", "gguf_type"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        _check_values(self)
        if self.quantize and not set(self.export) & set(QUANTIZED_EXPORTS):
            raise UserError(
                f"--quantize writes a second file with int8 weights, which only the formats "
                f"{' and '.join(QUANTIZED_EXPORTS)} have: add --export onnx, or leave --quantize "
                f"out"
            )
        if self.gguf_type and "gguf" not in self.export:
            raise UserError(
                f"--gguf-type {' '.join(self.gguf_type)} does nothing without --export gguf: add it"
            )

    @property
    def gguf_types(self) -> tuple[str, ...]:
        """The types of GGUF files to write."""
        return self.gguf_type or GGUF_TYPES[:1]


@dataclass(frozen=True, kw_only=True)
class HubSettings:
    """Whether the output is uploaded to the Hugging Face hub."""

    push_to_hub: str | None = choice(
        "upload the output to the repository USER/NAME",
        default=None,
        metavar="REPO",
        changes_output=False,
    )
    private: bool = choice("make the repository private", default=False, changes_output=False)
    hub_dry_run: bool = choice(
        "upload nothing; print what would be uploaded", default=False, changes_output=False
    )

    def __post_init__(self) -> None:
        for name in ("private", "hub_dry_run"):
            if getattr(self, name) and self.push_to_hub is None:
                raise UserError(
                    f"{flag_of(type(self), name)} does nothing without --push-to-hub REPO: add it"
                )


@dataclass(frozen=True)
class Options:
    """All choices of one run of the command, by subject; the titles are those of --help."""

    target: TargetSettings = field(metadata={"title": "what to prune"})
    data: DataSettings = field(metadata={"title": "data"})
    writing: WritingSettings = field(metadata={"title": "text generation, with --task seq2seq"})
    settings: Settings = field(metadata={"title": "method"})
    run: RunSettings = field(metadata={"title": "run"})
    output: OutputSettings = field(metadata={"title": "output"})
    hub: HubSettings = field(metadata={"title": "hub"})

    def __post_init__(self) -> None:
        if not self.removes_units:
            self._check_without_constraint()
        self._check_sizes()
        makes_plain = self.settings.uniform or self.settings.depth == "layers"
        if makes_plain and "dense" in self.output.export:
            flag = "--uniform" if self.settings.uniform else "--depth layers"
            raise UserError(
                "--export dense is for tools that cannot run code from a checkpoint, and a model "
                f"pruned with {flag} needs none: leave --export dense out"
            )
        for flag, given in (("--offload", self.run.offload), ("--max-memory", self.run.max_memory)):
            if given is not None and self.output.export:
                raise UserError(
                    f"--export {self.output.export[0]} needs the whole model in memory, and {flag} "
                    f"{given} avoids that: leave one of them out"
                )
        if self.hub.push_to_hub is not None and len(self.target.ratios) > 1:
            raise UserError(
                "--push-to-hub takes one model, but several constraints make several: push each "
                "afterwards with scripts/push_to_hub.py"
            )

    def _check_sizes(self) -> None:
        """Refuse choices that do nothing where the sizes are given."""
        if self.target.sizes is None:
            return
        given = [
            flag_of(type(subject), name)
            for subject, names in (
                (self.target, ("metric",)),
                (self.settings, _OF_SIZES),
            )
            for name in names
            if getattr(subject, name) != declared_default(type(subject), name)
        ]
        if given:
            raise UserError(
                f"{', '.join(given)} would do nothing, since --sizes gives the size of every "
                f"layer: leave one of the two out"
            )

    @property
    def removes_units(self) -> bool:
        """Whether heads and neurons are removed."""
        target = self.target
        return bool(target.constraint) or target.max_drop is not None or target.sizes is not None

    def _check_without_constraint(self) -> None:
        """Refuse to do nothing, and choices that do nothing where all units stay."""
        if self.settings.sparsity is None and not self.target.vocabulary:
            raise UserError(
                "there is nothing to prune: give --constraint RATIO (such as 0.5), --max-drop "
                "POINTS, --sizes FILE.json, --sparsity, or --vocabulary FILE (see rfprune --help)"
            )
        if "dense" in self.output.export:
            raise UserError(
                "--export dense restores the original shapes, which a model that keeps all heads "
                "and neurons has: leave it out"
            )
        given = {
            flag_of(type(subject), one.name)
            for subject in (self.target, self.settings, self.output)
            for one in fields(subject)
            if one.name in _OF_UNITS and getattr(subject, one.name) != one.default
        }
        if given:
            raise UserError(
                f"{', '.join(sorted(given))} would do nothing, since all heads and neurons stay: "
                f"add --constraint or --max-drop, or leave this out"
            )

    def _folder_name(self, ratio: float | None) -> str:
        """The name that distinguishes models of one checkpoint and task: mac-0.5, sparsity-2of4."""
        target, sparsity = self.target, self.settings.sparsity
        parts = []
        if self.removes_units:
            limit = None if target.max_drop is None else f"drop-{target.max_drop:g}"
            parts.append("sizes" if target.sizes else f"{target.metric}-{limit or ratio}")
        if sparsity is not None:
            parts.append(f"sparsity-{str(sparsity).replace(':', 'of')}")
        if target.vocabulary:
            parts.append("vocabulary")
        return "-".join(parts)

    def output_folder(self, ratio: float | None) -> Path:
        """The folder of the model pruned to `ratio`; with several ratios, one subfolder each."""
        target, folder = self.target, self.output.output_dir
        name = self._folder_name(ratio)
        if folder is not None:
            return folder if len(target.ratios) == 1 else folder / name
        model = re.sub(r"[^\w.-]+", "--", Path(target.model).expanduser().resolve().name)
        if not Path(target.model).expanduser().exists():
            model = target.model.replace("/", "--")
        return Path("outputs", model, target.task, name, f"seed-{self.settings.seed}")

    def identity(self, ratio: float | None) -> str:
        """SHA-256 of the ratio and of all choices that change the output."""
        ratio = ratio if self.target.max_drop is None else None  # it is found, not given
        values = {
            name: str(getattr(subject, name))
            for subject in (getattr(self, one.name) for one in fields(self))
            for name, declaration in declarations(type(subject)).items()
            if declaration.changes_output
        }
        return hashlib.sha256(json.dumps([ratio, values], sort_keys=True).encode()).hexdigest()
