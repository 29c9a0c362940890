"""What does the command say to bad and hostile input, and what does it leave behind?

Every case is run on tiny models, through `rfprune.main.main` or `load_pruned`: it must end with
one sentence, without a traceback, and with every file as it was before.

python scripts/bad_inputs.py [--only WORD ...] [--output results/bad_inputs.md]

Needs the extra rfprune[dev]. Exit code 1 where a case fails.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import one another

from scripts.bad_input_cases import CACHE, FLAGS, HUB, OUTPUT, Case
from scripts.bad_input_files import DATA, MODELS
from scripts.bad_input_place import Place, everything_in, make_material, sandbox
from scripts.bad_input_pruned import PRUNED
from scripts.bad_input_tasks import TASKS

CASES: tuple[Case, ...] = (*FLAGS, *MODELS, *DATA, *TASKS, *PRUNED, *OUTPUT, *CACHE, *HUB)

GROUPS = {
    "flags": "Flags",
    "model": "Checkpoints",
    "data": "Data",
    "tasks": "Data of other kinds",
    "pruned": "Pruned models, changed after pruning",
    "output": "Output folders",
    "cache": "The cache",
    "hub": "The hub",
}

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "results" / "bad_inputs.md"
_ERROR = "rfprune: error: "
_LONGEST_ANSWER = 320


@dataclass(frozen=True)
class Answer:
    """What became of a case: exit code, what was said, and what is wrong with that."""

    code: int | None
    said: str
    problems: tuple[str, ...]
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0, or 1 where a case fails."""
    options = _parser().parse_args(argv)
    chosen = [case for case in CASES if _is_chosen(case, options.only)]
    answers = []
    for case, answer in zip(chosen, try_all(chosen), strict=True):
        answers.append(answer)
        if answer.problems or options.verbose:
            sys.stderr.write(f"{case.group}: {case.given} [{answer.seconds:.1f} s]\n")
            sys.stderr.write("".join(f"  {problem}\n" for problem in answer.problems))
            sys.stderr.write(f"  {answer.said}\n")
    failed = sum(bool(answer.problems) for answer in answers)
    if not options.only:
        options.output.write_text(table(chosen, answers), encoding="utf-8")
    print(f"{len(chosen)} cases, {failed} failed")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="cases that have one of these; writes no table"
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE")
    parser.add_argument("--verbose", action="store_true", help="print every answer")
    return parser


def _is_chosen(case: Case, words: Sequence[str] | None) -> bool:
    return words is None or any(word in f"{case.group}: {case.given}" for word in words)


def try_all(cases: Sequence[Case]) -> Iterator[Answer]:
    """The answers to these cases, one after the other, in a place of their own."""
    from transformers.utils import logging

    from rfprune.main import main as command

    logging.disable_progress_bar()  # for a call of load_pruned, which leaves bars to the library
    with ExitStack() as undo, sandbox() as root:
        watched = root / "watched"
        os.chdir(watched / "here")
        # What a run times and draws is tested elsewhere; here it would only take time.
        undo.enter_context(mock.patch("rfprune.latency.speedup.MAX_ROUNDS", 1))
        undo.enter_context(mock.patch("rfprune.report.plots.OF_A_RUN", ()))
        material = make_material(watched / "material", command)
        for case in cases:
            folder = Path(tempfile.mkdtemp(dir=watched / "here"))
            os.chdir(folder)
            try:
                yield attempt(case, Place(material, folder), watched)
            finally:
                os.chdir(watched / "here")
                shutil.rmtree(folder)


def attempt(case: Case, place: Place, watched: Path) -> Answer:
    """Prepare a case in the current folder, run it, and look at what is said and left."""
    with place.undo:
        request = case.prepare(place)
        before = everything_in(watched)
        start = time.perf_counter()
        with _heard() as heard:
            code, trace = _run(request)
        seconds = time.perf_counter() - start
    out, err = heard
    problems = [] if trace is None else [trace]
    after = everything_in(watched)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if case.ends == "goes on":
        wanted = tuple(f"{place.folder.relative_to(watched)}/{name}/" for name in ("out", "cache"))
        changed = {name for name in changed if not f"{name}/".startswith(wanted)}
        problems += [] if code == 0 else [f"exit code {code}, not 0"]
        said = next((line for line in err.splitlines() if line.startswith("warning: ")), "")
    else:
        said, found = _refusal(case, code, out, err)
        problems += found
    if changed:
        problems.append(f"left or changed: {', '.join(sorted(changed)[:5])}")
    if case.says not in said:
        problems.append(f"does not say {case.says!r}")
    return Answer(code, said.replace(f"{place.folder}/", "").replace(str(watched), "..."),
                  tuple(problems), seconds)  # fmt: skip


def _refusal(case: Case, code: int | None, out: str, err: str) -> tuple[str, list[str]]:
    """The sentence, and what is wrong with it."""
    problems = []
    if out:
        problems.append(f"prints {out[:80]!r}")
    if case.ends == "loads":
        return err, problems + ([f"exit code {code}"] if code else [])
    if code != 2:
        problems.append(f"exit code {code}, not 2")
    said = err.removesuffix("\n").removeprefix(_ERROR)
    if not err.startswith(_ERROR) or len(said.splitlines()) != 1 or not said.endswith("."):
        problems.append(f"not one sentence: {err[:2000]!r}")
    if not said.isprintable():
        problems.append(f"signs that no terminal should be sent: {said!r}")
    return said, problems


def _run(request: Sequence[str] | Callable[[], object]) -> tuple[int | None, str | None]:
    """The exit code of the command, or what it would be of a call; and a traceback, if any."""
    from rfprune.errors import UserError
    from rfprune.main import main as command

    try:
        if not callable(request):
            return command(request), None
        request()
    except UserError as error:
        sys.stderr.write(f"{_ERROR}{error}{'' if str(error).endswith('.') else '.'}\n")
        return 2, None
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1, None
    except Exception:  # what nobody may ever see
        return 1, traceback.format_exc()
    return 0, None


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What Python, libraries in other languages and log handlers write: stdout and stderr."""
    texts: list[str] = []
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        files, saved = (out, err), [os.dup(1), os.dup(2)]
        streams = [io.TextIOWrapper(os.fdopen(os.dup(file.fileno()), "wb"), "utf-8",
                                    errors="backslashreplace", line_buffering=True,
                                    write_through=True) for file in files]  # fmt: skip
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            for number, file in enumerate(files, start=1):
                os.dup2(file.fileno(), number)
            with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
                yield texts
        finally:
            for number, (stream, descriptor) in enumerate(zip(streams, saved, strict=True), 1):
                stream.close()
                os.dup2(descriptor, number)
                os.close(descriptor)
            for file in files:
                file.seek(0)
                texts.append(file.read().decode("utf-8", "replace"))


def table(cases: Sequence[Case], answers: Sequence[Answer]) -> str:
    """The table, as Markdown."""
    failed = sum(bool(answer.problems) for answer in answers)
    lines = [
        "# Bad and hostile inputs",
        "",
        f"Written by `scripts/bad_inputs.py`: {len(cases)} inputs to the command and to the loader "
        f"of pruned models, {len(cases) - failed} answered as they should be, {failed} not.",
        "",
        "Should be: exit code 2 (a `UserError` from Python), one sentence and no traceback, and "
        "every file in the current folder, the home, the folder for temporary files and the cache "
        "as it was before. What the hub's own library keeps of its questions is not counted. Each "
        "line names what was changed in an input that is good otherwise.",
    ]
    for group, title in GROUPS.items():
        lines += ["", f"## {title}", "", "| given | answer |", "|---|---|"]
        lines += [
            f"| {_cell(case.given)} | {_cell(_shown(case, answer))} |"
            for case, answer in zip(cases, answers, strict=True)
            if case.group == group
        ]
    return "\n".join(lines) + "\n"


def _shown(case: Case, answer: Answer) -> str:
    if answer.problems:
        return f"**FAILED**: {answer.problems[0]}"
    text = answer.said
    if len(text) > _LONGEST_ANSWER:
        text = text[:_LONGEST_ANSWER] + " ..."
    if case.ends == "loads":
        return "loads; nothing of the folder is run"
    return f"goes on, with a {text}" if case.ends == "goes on" else text


def _cell(text: str) -> str:
    escaped = " ".join(text.split()).replace("|", "\\|")
    return escaped.replace("<", "&lt;").replace("*", "\\*") if "FAILED" not in escaped else escaped


if __name__ == "__main__":
    sys.exit(main())
