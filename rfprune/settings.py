"""Every choice of a run, without torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

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
