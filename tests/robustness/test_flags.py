"""Bad flags, output folders, caches and hubs: one sentence each, and nothing left behind.

Deleting this lets a traceback, or a half-written folder, be the answer to a typing mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rfprune.errors import UserError
from tests.robustness.harness import (
    GARBAGE,
    HANG,
    Case,
    Place,
    Request,
    check,
    parametrize,
    with_flags,
)


def _raw(given: str, says: str, *flags: str) -> Case:
    return Case(given, says, lambda _: list(flags))


def _one_flag(text: str, says: str) -> Case:
    """Good flags, and these after them."""
    return Case(f"`{text}`", says, lambda place: [*place.flags(), *text.split(" ")])


def _max_drop(text: str, says: str) -> Case:
    def prepare(place: Place) -> Request:
        return [*place.flags(constraint=None), f"--max-drop={text}"]

    return Case(f"`--max-drop {text}`", says, prepare)


def _sparsity_alone(text: str) -> Case:
    """A choice about heads and neurons where all of them stay."""

    def prepare(place: Place) -> Request:
        return [*place.flags(constraint=None), "--sparsity", "2:4", *text.split()]

    says = "would do nothing, since all heads and neurons stay"
    return Case(f"`{text}` without a constraint", says, prepare)


def _vocabulary(given: str, says: str, content: bytes | None, *flags: str) -> Case:
    """A file of --vocabulary with this content; None for no file."""

    def prepare(place: Place) -> Request:
        if content is not None:
            Path("texts.txt").write_bytes(content)
        constraint = None if flags and flags[0].startswith(("--max-drop", "--method")) else 0.5
        given = place.flags(constraint=constraint, skip_tune=True if constraint else None)
        return [*given, "--vocabulary", "texts.txt", *flags]

    return Case(f"`--vocabulary` with {given}", says, prepare)


def _sizes(given: str, says: str, content: str | None, *flags: str) -> Case:
    """A file of --sizes with this content; None for no file."""

    def prepare(place: Place) -> Request:
        if content is not None:
            Path("sizes.json").write_text(content, encoding="utf-8")
        return [*place.flags(constraint=None), "--sizes", "sizes.json", *flags]

    return Case(f"`--sizes` with {given}", says, prepare)


def _kept_by_none(place: Place) -> Request:
    from rfprune.max_drop import search
    from rfprune.tasks.bootstrap import Drop

    place.set(search, "paired_drop", lambda *_: Drop(9.0, 1.0, 0.0))
    return place.flags(constraint=None, max_drop=1, no_cache=True)


_NOT_A_RATIO = "is not a number between 0 and 1"

FLAGS = (
    _raw("no flags at all", "required: --model"),
    _raw("nothing but a word", "required: --model", "prune"),
    _raw("no `--constraint`", "give --constraint RATIO", "--model", "demo", "--task", "sst2"),
    *(
        _one_flag(f"--sparsity {text}", f"--sparsity {text} is not a fraction of zeros")
        for text in ("0", "1", "-0.5", "nan", "half", "0,5", "4:2", "2:2", "0:4", "2:", "2:4:8")
    ),
    _one_flag("--sparsity=", "--sparsity '' is not a fraction of zeros"),
    _one_flag("--sparsity 2:4 --sparsity-scope global", "fixes the density of every row"),
    _one_flag("--sparsity-criterion wanda", "does nothing without --sparsity"),
    _one_flag("--sparsity-scope global", "does nothing without --sparsity"),
    _one_flag("--sparsity 2:4 --sparsity-criterion fisher", "invalid choice: 'fisher'"),
    *map(_sparsity_alone, ("--uniform", "--method kwon", "--metric params", "--score-stages")),
    Case(
        "`--export dense` where all units stay",
        "--export dense restores the original shapes",
        lambda place: [
            "--model",
            "demo",
            "--task",
            "sst2",
            *"--sparsity 2:4 --export dense".split(),
        ],
    ),
    *(_one_flag(f"--constraint {text}", _NOT_A_RATIO) for text in ("0", "1", "1.5", "-1", "nan")),
    *(_one_flag(f"--constraint {text}", _NOT_A_RATIO) for text in ("inf", "half", "0,5")),
    _one_flag("--constraint 0.5 7", _NOT_A_RATIO),
    _one_flag("--constraint=", _NOT_A_RATIO),
    _one_flag("--max-drop 1", "not allowed with argument --constraint"),
    *(_max_drop(text, "is not a number from 0 up to 100") for text in ("-1", "100", "nan", "1,5")),
    _max_drop("", "is not a number from 0 up to 100"),
    Case("a `--max-drop` that no size keeps", "the largest ratio that was tried", _kept_by_none),
    _vocabulary("a missing file", "--vocabulary texts.txt does not exist", None),
    _vocabulary("an empty file", "holds no text", b""),
    _vocabulary("white space", "holds no text", b" \n\n"),
    _vocabulary("a binary file", "is binary", b"text\0\1\2"),
    _vocabulary("Latin-1", "is not UTF-8 (byte 3)", "café".encode("latin-1")),
    _vocabulary("UTF-16", "is binary", "text".encode("utf-16")),
    _vocabulary("too high a count", "no token that occurs 9", b"a\n", "--vocabulary-min-count=9"),
    _vocabulary(
        "a count of 0", "--vocabulary-min-count 0 is not", b"a", "--vocabulary-min-count=0"
    ),
    _vocabulary("--max-drop", "cannot be combined", b"a", "--max-drop=1"),
    _vocabulary("--method kwon alone", "since all heads and neurons stay", b"a", "--method=kwon"),
    _one_flag("--vocabulary-min-count 2", "does nothing without --vocabulary"),
    _one_flag("--vocabulary /", "--vocabulary / is a folder"),
    _one_flag("--protect layer.9", "which has the layers 0 to 1"),
    _one_flag("--protect layer", "is not a layer or sublayer"),
    _one_flag("--protect cross_heads", "names cross_heads"),
    _one_flag("--protect heads neurons", "is protected"),
    _one_flag("--protect layer.0 --uniform", "leave one of the two out"),
    _one_flag("--min-heads 9", "is more than the 4 heads of a layer"),
    _one_flag("--min-neurons -1", "--min-neurons -1 is not"),
    _one_flag("--min-heads 4 --min-neurons 12", "or is below a floor already costs"),
    _one_flag("--sizes sizes.json", "not allowed with argument --constraint"),
    _sizes("a missing file", "missing or not JSON", None),
    _sizes("no JSON", "missing or not JSON", "[{"),
    _sizes("sizes of one layer", "of 1 layers and the model has 2", '[{"heads": 1}]'),
    _sizes("too many heads", "keep 9 heads in layer 0", '[{"heads": 9}, {}]'),
    _sizes(
        "the report of a run with --depth",
        "removed layers whole ([1]), and sizes keep all layers",
        '{"layers": [{"heads": 4, "neurons": 12}, {"heads": 0}], "removed_layers": [1]}',
    ),
    _sizes("no list", "a list with an entry per layer", "3"),
    _sizes("a floor", "--min-heads would do nothing", '[{"heads": 1}, {}]', "--min-heads=1"),
    _one_flag("--task mrcp", "did you mean mrpc"),
    _one_flag("--task ../mrpc", "Unknown task"),
    _one_flag("--tsak mrpc", "nrecognized arguments: --tsak"),
    _one_flag("--sample 12", "nrecognized arguments: --sample"),
    _one_flag("--samples 0", "--samples 0 is not a whole number"),
    _one_flag("--samples 2.5", "--samples 2.5 is not a whole number"),
    _one_flag(f"--samples {'9' * 50}x", "is not a whole number"),
    _one_flag("--batch-size -1", "--batch-size -1 is not"),
    _one_flag("--max-length 2", "--max-length 2 is not"),
    _one_flag("--max-length 100000", "514 positions"),
    _one_flag("--eval-limit 0", "--eval-limit 0 is not"),
    _one_flag("--seed -1", "--seed -1 is not"),
    _one_flag(f"--seed {2**63}", "is not a whole number from 0 to"),
    _one_flag("--rounds 1000000", "--rounds 1000000 is not"),
    _one_flag("--metric size", "invalid choice: 'size'"),
    _one_flag("--method magic", "invalid choice: 'magic'"),
    _one_flag("--method kwon --importance taylor", "belongs to --method importance"),
    _one_flag("--skip-rearrange", "belongs to --method kwon"),
    _one_flag("--use-labels --importance random", "does nothing for --importance random"),
    _one_flag("--round-to 7", "invalid choice: 7"),
    _one_flag("--round-to half", "invalid int value: 'half'"),
    _one_flag("--uniform --allocation uniform", "leave one of them out"),
    _one_flag("--uniform --export dense", "leave --export dense out"),
    _one_flag("--uniform --constraint 0.1", "leave out --uniform"),
    _one_flag("--depth 0", "--depth 0 is not off, layers, joint, or how many layers"),
    _one_flag("--depth half", "--depth half is not off, layers, joint, or how many layers"),
    _one_flag("--depth 99", "choose at most"),
    _one_flag("--depth --rounds 2", "leave one of them out"),
    _one_flag("--depth --round-to 16", "choose --depth joint"),
    _one_flag("--depth --allocation uniform", "choose --depth joint"),
    _one_flag("--depth --export dense", "leave --export dense out"),
    Case(
        "`--uniform` on a pruned model, whose layers differ",
        "can only express",
        lambda place: place.flags(model=place.material.finished, uniform=True),
    ),
    _one_flag("--device gpu", "Unknown device 'gpu'"),
    _one_flag("--device cuda:99", "CUDA devices"),
    _one_flag("--dtype int8", "invalid choice: 'int8'"),
    _one_flag("--export pdf", "invalid choice: 'pdf'"),
    _one_flag("--quantize", "add --export onnx"),
    _one_flag("--gguf-type q8_0", "does nothing without --export gguf"),
    _one_flag("--export gguf --gguf-type q3", "invalid choice: 'q3'"),
    _one_flag("--export gguf", "--export gguf is for language models"),
    _one_flag("--export dense --quantize", "only the formats onnx and openvino have"),
    _one_flag("--no-cache --cache-dir c", "not allowed with argument"),
    _one_flag("--cache-dir=", "--cache-dir is empty"),
    _one_flag("--data-dir=", "--data-dir is empty"),
    _one_flag("--output-dir=", "--output-dir is empty"),
    _one_flag("--model=", "--model is empty"),
    _one_flag("--private", "does nothing without --push-to-hub"),
    _one_flag("--constraint 0.9 1e-12", "cannot be met"),
    _one_flag("--metric params --constraint 0.01", "cannot be met"),
    with_flags("a line break and a colour code in `--task`", "Unknown task", task="a\n\x1b[31m"),
    with_flags(
        "a line break and a colour code in `--model`",
        "control characters",
        model="a\n\x1b[31m",
    ),
    with_flags("a NUL in `--model`", "control characters", model="a\0b"),
    with_flags("a NUL in `--data-dir`", "control characters", data_dir="a\0b"),
    with_flags("`--model` of 5,000 letters", "File name too long", model="a" * 5000),
    with_flags(
        "the same, with the default `--output-dir`",
        "File name too long",
        model="a" * 5000,
        output_dir=None,
    ),
    with_flags(
        "`--model` in the home directory of an unknown user",
        "home directory that does not exist",
        model="~unknown.user/a",
    ),
    with_flags(
        "`--output-dir` in the home directory of an unknown user",
        "home directory that does not exist",
        output_dir="~unknown.user/a",
    ),
)


def _output(given: str, says: str, make: Callable[[Place], Any], **changes: Any) -> Case:
    """A case of a strange output folder; `make` may give its name."""

    def prepare(place: Place) -> Request:
        name = make(place)
        return place.flags(**{"output_dir": name or "out"} | changes)

    return Case(given, says, prepare)


def _foreign(_: Place) -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("years of work", encoding="utf-8")


def _finished(place: Place) -> None:
    place.copy(place.material.finished, "out")


def _full_disk(place: Place) -> None:
    """No file may grow beyond 20 kB."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    place.undo.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)


OUTPUT = (
    _output("an output of other flags", "already exists", _finished, seed=1),
    _output("somebody's own folder", "already exists", _foreign),
    _output(
        "somebody's own folder, with `--overwrite`", "has not written", _foreign, overwrite=True
    ),
    _output(
        "a file", "is a file", lambda _: Path("out").write_text("mine", encoding="utf-8") and None
    ),
    _output("below a file", "is a file", lambda place: place.material.model / "config.json" / "a"),
    _output("a device", "is a file", lambda _: "/dev/null"),
    _output("below a device", "is a file", lambda _: "/dev/null/out"),
    _output("where nothing can be written", "not writable", lambda _: "/proc/out"),
    _output("a name of 300 letters", "not writable (File name too long)", lambda _: "a" * 300),
    _output("a path of 5,000 letters", "not writable (File name too long)", lambda _: "a/" * 2500),
    _output("a NUL in the name", "control characters", lambda _: "a\0b"),
    _output("bytes that are no text in the name", "invalid bytes", lambda _: "caf\udce9"),
    _output("the current folder (empty), as `.`", "give the name of a new folder", lambda _: "."),
    _output("`..`", "give the name of a new folder", lambda _: ".."),
    _output("`out/..`, where there is no out", "give the name of a new folder", lambda _: "out/.."),
    _output("the root, as `/`", "give the name of a new folder", lambda _: "/"),
    _output("a link to nowhere", "is a link", lambda _: Path("out").symlink_to("nowhere")),
    _output("a link to itself", "is a link", lambda _: Path("out").symlink_to("out")),
    _output("the data folder", "already exists", lambda place: place.material.data),
    _output(
        "the model's own folder, with `--overwrite`",
        "has not written",
        lambda place: place.copy(place.material.model, "model"),
        model="model",
        overwrite=True,
    ),
    _output(
        "a disk that is full at the end of the run", "cannot be written", _full_disk, no_cache=True
    ),
)


def _cache(given: str, says: str, make: Callable[[Place], Any]) -> Case:
    def prepare(place: Place) -> Request:
        return place.flags(cache_dir=make(place), quiet=None, eval_limit=5)

    return Case(given, says, prepare, "warned")


def _spoilt_cache(change: Callable[[bytes], bytes]) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        cache = place.copy(place.material.cache, "cache")
        for entry in cache.iterdir():
            entry.write_bytes(change(entry.read_bytes()))
        return cache

    return make


CACHE = (
    _cache("every entry cut short", "damaged", _spoilt_cache(lambda old: old[:-1])),
    _cache(
        "every entry with one bit turned",
        "damaged",
        _spoilt_cache(lambda old: old[:-1] + bytes([old[-1] ^ 1])),
    ),
    _cache("every entry empty", "damaged", _spoilt_cache(lambda _: b"")),
    _cache(
        "a file for a folder",
        "cannot be written",
        lambda _: Path("c").write_text("mine", encoding="utf-8") and "c",
    ),
    _cache("where nothing can be written", "cannot be written", lambda _: "/proc/cache"),
)


def _repository(name: str, says: str = "is not a valid name of a repository") -> Case:
    return Case(
        f"`--push-to-hub {name[:40] or repr(name)}`",
        says,
        lambda place: [*place.flags(), f"--push-to-hub={name}"],
    )


def _with_hub(given: str, says: str, answer: int, **changes: Any) -> Case:
    def prepare(place: Place) -> Request:
        place.hub(answer)
        return place.flags(**changes)

    return Case(given, says, prepare)


def _push(given: str, says: str, answer: int) -> Case:
    """The model is there already, so that the push is all that is left to do."""

    def prepare(place: Place) -> Request:
        place.copy(place.material.finished, "out")
        place.hub(answer)
        return place.flags(push_to_hub="someone/small")

    return Case(f"a push to a hub that {given}", says, prepare)


def _without_token(place: Place) -> Request:
    place.hub(200)
    place.environment(HF_TOKEN="")
    return place.flags(push_to_hub="someone/small")


def _nobody_there(place: Place) -> Request:
    place.hub(200)
    place.environment(HF_ENDPOINT="http://127.0.0.1:9")
    return place.flags(model="someone/small")


_ANSWERS = {
    "answers 401": (401, "401"),
    "answers 403": (403, "403"),
    "answers 404": (404, "404"),
    "answers 429": (429, "429"),
    "answers 500": (500, "500"),
    "hangs": (HANG, ""),
    "answers with a page": (GARBAGE, ""),
}

HUB = (
    *(_repository(name) for name in ("../../etc/passwd", "a/../b", "a/b/c", "/etc", "-a", "a--b")),
    *(_repository(name) for name in ("", "a b", "a.git", "a\\b", "a/b\n", "someone/" + "a" * 97)),
    _repository("https://huggingface.co/a/b"),
    Case(
        "two constraints and `--push-to-hub`",
        "takes one model",
        lambda place: place.flags(constraint=(0.3, 0.5), push_to_hub="a/b"),
    ),
    Case("a push without a token", "no token", _without_token),
    Case("a model of a hub that nobody answers for", "neither a folder", _nobody_there),
    *(
        _with_hub(
            f"a model of a hub that {what}", "neither a folder", answer, model="someone/small"
        )
        for what, (answer, _) in _ANSWERS.items()
        if answer != HANG  # these end too, but the libraries try for minutes
    ),
    *(
        _with_hub(f"data of a hub that {what}", "give local files", answer, data_dir=None)
        for what, (answer, _) in _ANSWERS.items()
        if answer != HANG
    ),
    *(_push(what, says, answer) for what, (answer, says) in _ANSWERS.items()),
)


@parametrize((*FLAGS, *OUTPUT))
def test_bad_flags_and_output_folders_are_refused(case: Case, place: Place) -> None:
    check(case, place)


@parametrize(CACHE)
def test_a_bad_cache_is_a_warning(case: Case, place: Place) -> None:
    check(case, place)


@parametrize(HUB)
def test_hubs_that_fail_are_refused(case: Case, place: Place) -> None:
    check(case, place)


def _leave_a_file() -> None:
    Path("left").touch()
    raise UserError("refused")


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        (Case("another answer", "something else", lambda _: []), "required: --model"),
        (Case("a bug", "", lambda _: lambda: 1 / 0), "division by zero"),
        (Case("no refusal", "", lambda _: lambda: None), r"\(0, ''\) == \(2, ''\)"),
        (
            Case("a file left", "refused", lambda _: _leave_a_file),
            "left behind or changed.*here/left",
        ),
    ],
    ids=lambda value: value.given if isinstance(value, Case) else "",
)
def test_the_check_fails_where_it_should(case: Case, problem: str, place: Place) -> None:
    with pytest.raises((AssertionError, ZeroDivisionError), match=problem):
        check(case, place)
