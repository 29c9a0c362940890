"""Result files: without these tests a measurement of hours could be lost, doubled or mixed up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rfprune.errors import UserError
from rfprune.settings import METHODS
from scripts.bench import harness
from scripts.bench.harness import Conditions, NotMeasured
from tests.bench.conftest import ReadLines

WANTED = [{"model": "m", "seed": seed, "ratio": ratio} for seed in (0, 1) for ratio in (0.5, 0.3)]


class Fake:
    """A measurement that notes the groups it is given; it fails for one ratio."""

    def __init__(self, *, stop: float = 0, refuse: float = 0) -> None:
        self.groups: list[Sequence[Conditions]] = []
        self.stop, self.refuse = stop, refuse

    def __call__(self, group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
        self.groups.append(group)
        for one in group:
            if one["ratio"] == self.stop:
                raise KeyboardInterrupt
            if one["ratio"] == self.refuse:
                raise NotMeasured("no gradients today")
            yield one | {"score": 100 * one["ratio"]}


def complete(output: Path, fake: Fake, wanted: Sequence[Conditions] = WANTED, **more: Any) -> int:
    return harness.complete(__file__, output, wanted, fake, group_by=("seed",), **more)


def test_the_same_command_measures_what_is_missing(
    output: Path, lines: ReadLines, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Fake()
    assert complete(output, first, WANTED[:1]) == 0
    before = output.read_text()
    with pytest.raises(KeyboardInterrupt):
        complete(output, Fake(stop=0.3))
    with output.open("a") as file:
        file.write('{"model": "cut sh')  # killed while it wrote
    fake = Fake()
    assert complete(output, fake) == 0
    assert fake.groups == [[WANTED[1]], WANTED[2:]]
    assert output.read_text().startswith(before)
    assert "other code" not in capsys.readouterr().err
    assert [(line["seed"], line["ratio"], line["score"]) for line in lines()] == [
        (0, 0.5, 50), (0, 0.3, 30), (1, 0.5, 50), (1, 0.3, 30)
    ]  # fmt: skip
    before = output.read_text()
    assert complete(output, fake) == 0
    assert (output.read_text(), len(fake.groups)) == (before, 2)


def test_one_measurement_that_is_not_possible_leaves_the_others(
    output: Path, lines: ReadLines, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complete(output, Fake(refuse=0.3)) == 1
    assert [line["seed"] for line in lines()] == [0, 1]
    assert "not measured: no gradients today" in capsys.readouterr().err


def test_a_measurement_that_stops_before_its_first_line_leaves_no_file(output: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        complete(output, Fake(stop=0.5))
    assert not output.exists()
    assert complete(output, Fake(), WANTED[:1]) == 0
    assert output.exists()


def test_a_file_of_another_machine_or_measurement_is_refused(output: Path) -> None:
    here = {"machine": {"threads": 1}}
    assert complete(output, Fake(), WANTED[:1], same=here) == 0
    content = output.read_text()
    with pytest.raises(UserError, match="another machine.*name another file"):
        complete(output, Fake(), same={"machine": {"threads": 2}})
    with pytest.raises(UserError, match="another measurement, without length"):
        complete(output, Fake(), [WANTED[1] | {"length": 5}], same=here)
    assert output.read_text() == content


@pytest.mark.parametrize(
    ("content", "words"),
    [("my notes\nand more", "something else than results"), ("[1]\n", "something else")],
)
def test_a_file_of_something_else_is_left_alone(output: Path, content: str, words: str) -> None:
    output.parent.mkdir()
    output.write_text(content)
    with pytest.raises(UserError, match=words):
        complete(output, Fake())
    assert output.read_text() == content
    with pytest.raises(UserError, match=r"must end in \.jsonl"):
        complete(output.with_suffix(".json"), Fake())
    with pytest.raises(UserError, match="cannot be written"):
        complete(output / "below" / "a_file.jsonl", Fake())


def test_lines_record_the_code_that_measured_them(
    output: Path,
    lines: ReadLines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A commit is not enough: the working tree may hold something else."""
    complete(output, Fake(), WANTED[:1])
    (line,) = lines()
    assert line["code"] == harness.code_digest(__file__)
    output.write_text(json.dumps(line | {"code": None}) + "\n")
    complete(output, Fake(), WANTED[:2])
    assert "1 lines are of other code than today's" in capsys.readouterr().err
    module = tmp_path / "module.py"
    module.write_text("x = 1\n")
    first = harness.code_digest(str(module))
    module.write_text("x = 2\n")
    assert harness.code_digest(str(module)) != first
    (tmp_path / "rfprune" / "stages").mkdir(parents=True)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    own = tmp_path / "rfprune" / "stages" / "search.py"
    digests = set()
    for text in ("a = 1\n", "a = 2\n"):
        own.write_text(text)
        digests.add(harness.code_digest(str(module)))
    assert len(digests) == 2


def test_common_flags_are_declared_once() -> None:
    parser = harness.parser_of(
        None, "model constraint method samples", constraint=[harness.REQUIRED], samples=[64]
    )
    options = parser.parse_args(["--model", "a/b", "--constraint", "0.5", "0.3"])
    assert (options.constraint, options.samples) == ([0.5, 0.3], [64])
    assert options.method == METHODS[0]
    assert harness.model_name(options) == "a/b"
    assert harness.default_output("quality", "a/b", None).name == "quality_a--b.jsonl"
    for wrong in (["--constraint", "1"], ["--samples", "0"]):
        with pytest.raises(UserError, match=wrong[1]):
            parser.parse_args(["--model", "m", "--constraint", "0.5", *wrong])
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "m"])


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(UserError, match=r"scripts\.bench\.scale failed"):
        harness.in_process("scripts.bench.scale", ["--alone", "--size", "huge"])
