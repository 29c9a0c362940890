"""The harness of all measurements: result files that resume, provenance, common flags.

A measurement is described by its conditions. Its result is one line of JSON in a file of
`results/`: the conditions, what was measured, and what it was measured with. A line is written as
soon as it is known, and the same command measures only what its file lacks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from rfprune.errors import UserError
from rfprune.settings import DTYPES, FRACTION, METHODS, METRICS, Allowed, whole_number
from rfprune.tasks.registry import TASK_NAMES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"

Conditions = dict[str, Any]
Line = Mapping[str, Any]
Item = TypeVar("Item")
Measure = Callable[[Sequence[Conditions]], Iterable[Line]]
"""From conditions that are still to be measured, their lines, in any order."""


class NotMeasured(Exception):
    """One measurement is not possible; the others go on."""


def number(flag: str, allowed: Allowed, kind: Callable[[str], Any] = float) -> Callable[[str], Any]:
    """A reader for argparse of the numbers that are allowed."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed.test(value):
            raise UserError(f"{flag} {text} is not {allowed.description}.")
        return value

    return read


def count(flag: str, minimum: int = 1) -> Callable[[str], Any]:
    """A reader for argparse of whole numbers from a minimum."""
    return number(flag, whole_number(minimum), int)


def _count(name: str, minimum: int) -> dict[str, Any]:
    return {"type": count(f"--{name}", minimum), "metavar": "N"}


FLAGS: Mapping[str, Mapping[str, Any]] = {
    "model": {"help": "a folder, hub id, alias, or demo"},
    "task": {"help": ", ".join(TASK_NAMES)},
    "data-dir": {"type": Path, "metavar": "DIR", "help": "local data, DIR/TASK/...; else the hub"},
    "constraint": {
        "type": number("--constraint", FRACTION),
        "help": "fraction of the cost to keep",
    },
    "metric": {"choices": METRICS, "help": "the cost that is constrained"},
    "method": {"choices": METHODS, "help": "method of pruning"},
    "samples": {**_count("samples", 1), "help": "calibration examples"},
    "seed": {**_count("seed", 0), "help": "draws the calibration examples"},
    "batch-size": {**_count("batch-size", 1), "help": "examples a batch"},
    "max-length": {**_count("max-length", 8), "help": "tokens an example (default: the task's)"},
    "length": {**_count("length", 1), "help": "tokens an example"},
    "eval-limit": {**_count("eval-limit", 1), "help": "validation examples (default: all)"},
    "rounds": {**_count("rounds", 1), "help": "how often everything is timed"},
    "seconds": {"type": float, "metavar": "S", "help": "of timing at most"},
    "device": {"choices": ("cpu", "cuda", "mps"), "help": "where the model runs"},
    "dtype": {"choices": DTYPES, "help": "of the weights"},
}
"""Flags that several measurements share. `parser_of` adds their defaults."""

REQUIRED = object()
"""The default of a flag that must be given."""

DEFAULTS: Mapping[str, Any] = {
    "model": REQUIRED,
    "task": REQUIRED,
    "metric": "mac",
    "method": METHODS[0],
    "samples": 2048,
    "seed": 0,
    "batch-size": 32,
    "dtype": "float32",
}


def parser_of(description: str | None, names: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with some of the common flags, and with `--output`.

    Args:
        names: of the flags, separated by spaces.
        defaults: by name, with _ for -, where they differ from `DEFAULTS`. A flag takes several
            values if its default is a list.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name in names.split():
        default = defaults.get(name.replace("-", "_"), DEFAULTS.get(name))
        settings: dict[str, Any] = dict(FLAGS[name])
        if default is REQUIRED or default == [REQUIRED]:
            settings["required"] = True
        else:
            settings["default"] = default
        if isinstance(default, list):
            settings["nargs"] = "+"
        if default not in (None, REQUIRED, [REQUIRED]):
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            settings["help"] += f" (default: {shown})"
        parser.add_argument(f"--{name}", **settings)
    parser.add_argument(
        "--output", type=Path, metavar="FILE.jsonl", help="default: in results/, named by the flags"
    )
    return parser


def conditions_of(options: argparse.Namespace, names: Iterable[str]) -> Conditions:
    """The values of these flags; the model by its name alone."""
    found = {name: getattr(options, name) for name in names}
    if "model" in found:
        found["model"] = model_name(options)
    return found


def model_name(options: argparse.Namespace) -> str:
    """A folder's name without its path; a hub id, an alias or a synthetic size as it is."""
    if synthetic := getattr(options, "synthetic", None):
        return str(synthetic)
    path = Path(options.model).expanduser()
    return path.resolve().name if path.exists() else str(options.model)


def default_output(*parts: object) -> Path:
    """results/PART_PART_....jsonl; parts that are None are left out."""
    name = "_".join(str(part).replace("/", "--") for part in parts if part is not None)
    return RESULTS / f"{name}.jsonl"


def complete(
    module: str,
    output: Path,
    wanted: Sequence[Conditions],
    measure: Measure,
    *,
    group_by: Sequence[str] = (),
    same: Line | None = None,
) -> int:
    """Measure what `output` lacks: 0 done, 1 something could not be measured.

    Args:
        module: `__file__` of the measurement; the digest of the code covers it.
        wanted: every measurement by its conditions; all have the same names.
        measure: is given the missing conditions that agree in `group_by`, one group at a time.
        same: values that all lines of the file must share, such as the machine of a timing.

    Raises:
        UserError: the file holds something else, or cannot be read or written.
    """
    names = tuple(wanted[0])
    lines = read_lines(output)
    _check_same(output, lines, names, same or {})
    known = {_key(line, names) for line in lines}
    missing = [one for one in wanted if _key(one, names) not in known]
    say(f"{output}: {len(missing)} of {len(wanted)} measurements to make")
    if not missing:
        return 0
    check_writable(output)
    made_with = provenance(module)
    if others := sum(line.get("code") != made_with["code"] for line in lines):
        say(f"{others} lines are of other code than today's: remove them to measure them again")
    failed = False
    for group in grouped(missing, group_by):
        try:
            for line in measure(group):
                append_line(output, {**line, **(same or {}), **made_with, "measured_at": _now()})
                say(summary_of(line, names))
        except NotMeasured as error:
            failed = True
            say(f"not measured: {error}")
    return 1 if failed else 0


def _key(line: Line, names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in names)


def _check_same(output: Path, lines: Sequence[Line], names: Sequence[str], same: Line) -> None:
    for line in lines:
        if lacking := [name for name in names if name not in line]:
            raise UserError(
                f"--output {output} holds lines of another measurement, without "
                f"{', '.join(lacking)}: name another file."
            )
        for name, value in same.items():
            if line.get(name) != value:
                raise UserError(
                    f"--output {output} was measured with another {name} ({line.get(name)}, here "
                    f"{value}), and numbers of one file must be comparable: name another file."
                )


def grouped(lines: Iterable[Any], names: Sequence[str]) -> list[list[Any]]:
    """Lines that agree in these names side by side, groups in the order of their first lines."""
    return grouped_by(lines, lambda line: _key(line, names))


def grouped_by(items: Iterable[Item], key: Callable[[Item], Any]) -> list[list[Item]]:
    """Items of the same key side by side, groups in the order of their first items."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a result file; none if it does not exist.

    A last line that a killed process left incomplete is cut off the file.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    if path.suffix != ".jsonl":  # never cut a line off a file of another kind
        raise UserError(f"--output {path} must end in .jsonl: it gets one line of JSON a result.")
    try:
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        lines = [dict(json.loads(text)) for text in whole.splitlines()]
        if whole != content:
            os.truncate(path, len(whole))
    except OSError as error:
        raise UserError(f"--output {path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--output {path} holds something else than results ({error}): name another file."
        ) from error
    return lines


def check_writable(path: Path) -> None:
    """Check that lines can be added to a file, which is not left behind if it is new.

    Raises:
        UserError: they cannot.
    """
    is_new = not path.exists()
    _append(path, "")
    if is_new:
        path.unlink()


def append_line(path: Path, line: Line) -> None:
    """Add a line and flush it to the disk.

    Raises:
        UserError: the file cannot be written.
    """
    _append(path, json.dumps(line, allow_nan=False) + "\n")


def _append(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}.") from error


def provenance(module: str) -> dict[str, Any]:
    """Versions of the packages, digest of the code, and commit."""
    from rfprune.report.report_json import versions

    return {"versions": versions(), "code": code_digest(module), "commit": _commit()}


def code_digest(module: str) -> str:
    """SHA-256, shortened, of all code of the package and of the measurement.

    That is `module`, and the scripts that several measurements import. Peers are among them only
    for the measurements of them, `scripts.bench.quality` and `scripts.bench.pruning_time`.
    """
    shared = ("bench/harness.py", "bench/models.py", "bench/timed_models.py", "profile_latency.py")
    scripts = Path(__file__).resolve().parents[1]
    own = {*(scripts / name for name in shared), Path(module).resolve()}
    if Path(module).stem in ("quality", "pruning_time"):
        own |= {*(scripts / "bench" / "peers").glob("*.py")}
    paths = {*(ROOT / "rfprune").rglob("*.py"), *own}
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _commit() -> str | None:
    """The commit of the working tree, with -dirty if it was changed since; None outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def machine(device: str) -> dict[str, Any]:
    """Hardware, threads and versions: timings in one file must share them.

    Raises:
        UserError: the device does not exist.
    """
    from importlib.util import find_spec

    import torch

    from rfprune.checkpoints.device import pick_device
    from rfprune.latency.conditions import device_name
    from rfprune.report.report_json import versions

    found = {name: versions()[name] for name in ("python", "torch", "transformers")}
    if find_spec("onnxruntime"):
        from importlib.metadata import version

        found["onnxruntime"] = version("onnxruntime")
    return {
        "device_name": device_name(pick_device(device)),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "tf32": device == "cuda" and torch.backends.cuda.matmul.allow_tf32,
        "versions": found,
    }


def in_process(module: str, arguments: Sequence[str], **environment: str) -> Any:
    """Run `python -m MODULE ARGUMENTS` in a fresh process: its last line, read as JSON.

    Raises:
        UserError: the process failed; its last words are in the sentence.
    """
    (result,) = in_processes(module, arguments, [environment])
    return result


def in_processes(
    module: str, arguments: Sequence[str], environments: Sequence[Mapping[str, str]]
) -> list[Any]:
    """The same for several processes at a time, one for each set of environment variables."""
    command = [sys.executable, "-m", module, *arguments]
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **path, **own},
        )
        for own in environments
    ]
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            printed = errors.strip().splitlines() or [
                f"exit code {process.returncode}, out of memory?"
            ]
            reason = printed[-1].rpartition("error: ")[2][:300]
            raise UserError(f"A process of {module} failed ({reason}).")
    return [json.loads(out.splitlines()[-1]) if out.strip() else None for out, _ in outputs]


def warnings_on_stderr() -> AbstractContextManager[list[str]]:
    """Collects the package's warnings in a list, and shows them on standard error."""
    from rich.console import Console

    from rfprune.cli.console import collected_warnings

    return collected_warnings(Console(stderr=True, highlight=False), verbose=False)


def summary_of(line: Line, names: Sequence[str]) -> str:
    """The conditions and the plain numbers of a line, for the console."""
    numbers = {
        name: f"{value:.4g}" if isinstance(value, float) else value
        for name, value in line.items()
        if name not in names and isinstance(value, int | float) and not isinstance(value, bool)
    }
    own = " ".join(f"{line[name]}" for name in names if line[name] is not None)
    return f"{own}: {', '.join(f'{name} {value}' for name, value in numbers.items())}"


def say(text: str) -> None:
    """Write a line with the time to standard error."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def each_combination(**values: Iterable[Any]) -> Iterator[Conditions]:
    """Every combination of the values, the last name varying fastest; nothing twice."""
    from itertools import product

    for combination in dict.fromkeys(product(*values.values())):
        yield dict(zip(values, combination, strict=True))
