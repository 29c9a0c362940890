"""Every choice of a run, without torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from rfprune.errors import UserError

METHODS = ("curvature", "kwon", "importance")
METRICS = ("mac", "params", "memory", "latency")
CRITERIA = ("fisher", "taylor", "gradient", "magnitude-l2", "magnitude-l1", "random")
WEIGHT_CRITERIA = CRITERIA[3:]
"""Criteria that are computed without a loss, so without data."""

ALLOCATIONS = ("global", "uniform")
GRADIENTS = ("per-example", "per-batch")
TEACHERS = ("dense", "scheduled")
MULTIPLES = (8, 16, 32, 64)
DTYPES = ("float32", "bfloat16", "float16")
EXPORTS = ("dense", "onnx")
MOST_ROUNDS = 16


@dataclass(frozen=True)
class Settings:
    """How to prune.

    Attributes:
        method: "curvature", or "kwon", the published method that it goes past, or "importance":
            a classical criterion for the selection, and the refit of "curvature".
        importance: the criterion of method "importance"; see `rfprune.stages.importance`.
        allocation: of method "importance": "global", the most important units for the budget
            wherever they are, or "uniform", the same fraction of every sublayer.
        use_labels: importance from the loss on labels, as the authors' code; else label-free.
        gradients: "per-example", or "per-batch" as the authors' code.
        rearrange: refine the searched masks with the block Fisher information.
        tune: fit what is left to the teacher by least squares.
        teacher: "dense" (the model as it is, which measures better), or "scheduled" (masked at the
            square root of the constraint, as the authors' code).
        uniform: the same number of heads and of neurons in every layer, chosen for the least error,
            so that the result is a plain architecture (see `rfprune.model.plain`) without code of
            its own. (`allocation="uniform"` is a classical baseline: the same fraction of both.)
        round_to: keep neurons in multiples of 8, 16, 32 or 64 (or none, or all); None: any number.
        rounds: prune in so many steps; after each, what is left is fitted and looked at afresh.
        seed: of the labels that are sampled where the exact Fisher is too costly.

    Raises:
        UserError: an unknown choice, one that belongs to another method, or fewer than one round.
    """

    method: str = METHODS[0]
    importance: str = CRITERIA[0]
    allocation: str = ALLOCATIONS[0]
    use_labels: bool = False
    gradients: str = GRADIENTS[0]
    rearrange: bool = True
    tune: bool = True
    teacher: str = TEACHERS[0]
    uniform: bool = False
    round_to: int | None = None
    rounds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "method": METHODS,
            "importance": CRITERIA,
            "allocation": ALLOCATIONS,
            "gradients": GRADIENTS,
            "teacher": TEACHERS,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} '{value}' is unknown; choose one of {', '.join(known)}")
        for name in ("importance", "allocation"):
            value = getattr(self, name)
            if self.method != "importance" and value != choices[name][0]:
                raise UserError(
                    f"{name} '{value}' belongs to the method importance and does nothing for "
                    f"{self.method}; leave it out, or choose method='importance'"
                )
        if self.uniform and self.allocation == "uniform":
            raise UserError(
                "allocation 'uniform' keeps the same fraction everywhere, and uniform=True chooses "
                "sizes itself; leave one of them out"
            )
        if self.round_to is not None and self.round_to not in MULTIPLES:
            raise UserError(
                f"round_to {self.round_to} is not possible; choose one of "
                f"{', '.join(str(multiple) for multiple in MULTIPLES)}, or None"
            )
        if self.rounds < 1:
            raise UserError(f"rounds {self.rounds} is not possible; choose 1 or more")


_ASIDE = (
    *("constraint", "output_dir", "overwrite", "cache_dir", "no_cache", "quiet", "verbose"),
    *("push_to_hub", "private", "hub_dry_run"),
)
"""Flags that change nothing about the output of one of the constraints."""


@dataclass(frozen=True)
class Options:
    """One run of the command; names and meanings are those of the flags."""

    model: str
    task: str
    constraint: tuple[float, ...]
    max_drop: float | None
    metric: str
    latency_table: Path | None
    method: str
    importance: str
    allocation: str
    data_dir: Path | None
    text_columns: tuple[str, ...] | None
    label_column: str | None
    samples: int
    batch_size: int
    max_length: int | None
    eval_limit: int | None
    seed: int
    use_labels: bool
    gradients: str
    teacher: str
    skip_rearrange: bool
    skip_tune: bool
    uniform: bool
    round_to: int | None
    rounds: int
    device: str | None
    dtype: str | None
    output_dir: Path | None
    overwrite: bool
    score_stages: bool
    push_to_hub: str | None
    private: bool
    hub_dry_run: bool
    cache_dir: Path | None
    no_cache: bool
    export: tuple[str, ...]
    quantize: bool
    quiet: bool
    verbose: bool

    @property
    def ratios(self) -> tuple[float | None, ...]:
        """One for each model to make; None for the one that `--max-drop` finds."""
        return self.constraint or (None,)

    def output_folder(self, ratio: float | None) -> Path:
        """Where the model pruned to `ratio` goes; several ratios go to a folder each."""
        limit = None if self.max_drop is None else f"drop-{self.max_drop:g}"
        name = f"{self.metric}-{limit or ratio}"
        if self.output_dir is not None:
            return self.output_dir if len(self.ratios) == 1 else self.output_dir / name
        model = re.sub(r"[^\w.-]+", "--", Path(self.model).expanduser().resolve().name)
        if not Path(self.model).expanduser().exists():
            model = self.model.replace("/", "--")
        return Path("outputs", model, self.task, name, f"seed-{self.seed}")

    def identity(self, ratio: float | None) -> str:
        """SHA-256 of the flags that tell one output from another; any new flag is one of them."""
        ratio = ratio if self.max_drop is None else None  # it is found, not given
        flags = {name: str(value) for name, value in asdict(self).items() if name not in _ASIDE}
        return hashlib.sha256(json.dumps([ratio, flags], sort_keys=True).encode()).hexdigest()
