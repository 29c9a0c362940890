"""Flags become the settings of a run; what cannot be is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfprune.cli.parser import parse
from rfprune.errors import UserError
from rfprune.settings import CRITERIA, METHODS, Options, Settings

NEEDED = ["--model", "demo", "--task", "sst2", "--constraint", "0.5"]
CUSTOM = [*NEEDED[:3], "custom", *NEEDED[4:], "--data-dir", "mine"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_defaults_are_those_of_the_paper() -> None:
    options = parse(NEEDED)
    assert (options.samples, options.batch_size, options.seed) == (2048, 32, 0)
    assert (options.metric, options.method) == ("mac", METHODS[0])
    assert (options.max_length, options.eval_limit) == (None, None)
    assert (options.data_dir, options.device) == (None, None)
    assert not (options.use_labels or options.skip_rearrange or options.skip_tune)
    assert options.dtype is None, "float32, and stored as the original is"


def test_a_criterion_or_an_allocation_implies_the_method() -> None:
    """Nobody wants `--importance taylor` to do nothing, or to be refused for want of --method."""
    for criterion in CRITERIA:
        options = parse([*NEEDED, "--importance", criterion])
        assert (options.method, options.importance) == ("importance", criterion)
        assert options.allocation == Settings().allocation
    options = parse([*NEEDED, "--allocation", "uniform"])
    assert (options.method, options.importance) == ("importance", Settings().importance)
    assert options == parse([*NEEDED, "--method", "importance", "--allocation", "uniform"])
    assert parse(NEEDED).importance == Settings().importance


def test_rules_for_sizes_make_another_output() -> None:
    plain = parse(NEEDED)
    assert (plain.uniform, plain.round_to) == (Settings().uniform, 8)
    assert parse([*NEEDED, "--round-to", "1"]).round_to == Settings().round_to is None
    assert parse([*NEEDED, "--method", "kwon"]).round_to is None
    ruled = parse([*NEEDED, "--uniform", "--round-to", "8"])
    assert (ruled.uniform, ruled.round_to) == (True, 8)
    assert ruled.identity(0.5) != plain.identity(0.5)


def test_several_constraints_go_to_a_folder_each(tmp_path: Path) -> None:
    options = parse([*NEEDED, "0.3", "0.5", "--output-dir", str(tmp_path / "out")])
    assert options.constraint == (0.5, 0.3), "one that is given twice is pruned to once"
    assert options.output_folder(0.3) == tmp_path / "out" / "mac-0.3"


def test_one_constraint_goes_to_the_folder_itself(tmp_path: Path) -> None:
    options = parse([*NEEDED, "--output-dir", str(tmp_path / "out")])
    assert options.output_folder(0.5) == tmp_path / "out"


@pytest.mark.parametrize(
    ("model", "name"),
    [("demo", "demo"), ("owner/model", "owner--model"), ("here/model", "model"), (".", None)],
)
def test_the_default_folder_tells_runs_apart(model: str, name: str | None, tmp_path: Path) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    options = parse(["--model", model, *NEEDED[2:], "--seed", "3", "--metric", "params"])
    expected = Path("outputs", name or tmp_path.name, "sst2", "params-0.5", "seed-3")
    assert options.output_folder(0.5) == expected


@given(st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True))
def test_every_fraction_is_a_constraint(ratio: float) -> None:
    assert parse([*NEEDED[:5], repr(ratio)]).constraint == (ratio,)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([*NEEDED[:4]], "one of the arguments --constraint --max-drop is required"),
        ([*NEEDED, "--tsak", "mrpc"], "unrecognized arguments: --tsak"),
        ([*NEEDED, "--sample", "12"], "unrecognized arguments: --sample"),
        ([*NEEDED, "--task", "mrcp"], "Unknown task 'mrcp', did you mean mrpc: .*squad_v2"),
        ([*NEEDED, "--task", "?"], "Unknown task '?': the tasks are mrpc"),
        ([*NEEDED[:5], ""], "--constraint '' is not a number between 0 and 1"),
        *(
            ([*NEEDED[:5], value], f"--constraint {value} is not a number between 0 and 1")
            for value in ("0", "1", "1.5", "-1", "-0.5", "abc", "nan", "inf")
        ),
        ([*NEEDED, "--samples", "0"], "--samples 0 is not a whole number of at least 1"),
        ([*NEEDED, "--samples", "-3"], "--samples -3 is not a whole number of at least 1"),
        ([*NEEDED, "--samples", "many"], "--samples many is not a whole number"),
        ([*NEEDED, "--batch-size", "0"], "--batch-size 0 is not"),
        ([*NEEDED, "--max-length", "2"], "--max-length 2 is not .* at least 8"),
        ([*NEEDED, "--eval-limit", "0"], "--eval-limit 0 is not"),
        ([*NEEDED, "--seed", "-1"], "--seed -1 is not .* from 0 to"),
        ([*NEEDED, "--seed", str(2**63)], "is not a whole number from 0 to 9223372036854775807"),
        ([*NEEDED, "--model", " "], "--model is empty"),
        ([*NEEDED, "--data-dir", ""], "--data-dir is empty"),
        ([*NEEDED, "--output-dir", ""], "--output-dir is empty"),
        ([*NEEDED, "--text-columns", "a"], "--text-columns belongs to --task custom .* for sst2"),
        ([*NEEDED, "--label-column", "a"], "--label-column belongs to --task custom"),
        ([*NEEDED, "--task", "custm"], "did you mean custom"),
        ([*CUSTOM[:6]], "--task custom needs data of yours: give --data-dir DIR"),
        ([*CUSTOM, "--text-columns", "a", "b", "c"], "--text-columns a b c: .* one text or two"),
        ([*CUSTOM, "--text-columns", "a", "--label-column", "a"], "'a' is named twice"),
        ([*CUSTOM, "--label-column", ""], "column's name is empty"),
        *(
            ([*NEEDED, f"--{flag}", name], f"--{flag} {shown} has control characters")
            for flag in ("model", "data-dir", "output-dir", "cache-dir")
            for name, shown in (("a\0b", r"'a.x00b'"), ("a\x1b[1m", "'a.x1b.1m'"))
        ),
        ([*NEEDED, "--output-dir", "caf\udce9"], "bytes that are no text"),
        ([*NEEDED, "--output-dir", "~nobody.here/a"], "below a home that is not there"),
        ([*NEEDED, "--model", "a" * 5000], "no name that there can be .File name too long"),
        ([*NEEDED, "--metric", "size"], "--metric: invalid choice: 'size'"),
        ([*NEEDED, "--method", "magic"], "--method: invalid choice: 'magic'"),
        *(
            ([*NEEDED, "--method", "curvature", *flag.split()], f"{flag} belongs to --method kwon")
            for flag in ("--gradients per-batch", "--teacher scheduled", "--skip-rearrange")
        ),
        *(
            ([*NEEDED, "--method", method, *flag.split()], f"{flag} belongs to --method importance")
            for flag in ("--importance taylor", "--importance fisher", "--allocation global")
            for method in ("curvature", "kwon")
        ),
        ([*NEEDED, "--importance", "magic"], "--importance: invalid choice: 'magic'"),
        ([*NEEDED, "--importance", "taylor", "--skip-rearrange"], "belongs to --method kwon"),
        *(
            ([*NEEDED, "--use-labels", "--importance", criterion], "--use-labels does nothing for")
            for criterion in ("random", "magnitude-l1", "magnitude-l2")
        ),
        ([*NEEDED, "--uniform", "--allocation", "uniform"], "leave one of them out"),
        ([*NEEDED, "--uniform", "--export", "dense"], "leave --export dense out"),
        ([*NEEDED, "--round-to", "7"], "--round-to: invalid choice: 7"),
        ([*NEEDED, "--round-to", "all"], "--round-to: invalid int value: 'all'"),
        ([*NEEDED, "--device", "gpu"], "Unknown device 'gpu': choose cpu, cuda"),
        ([*NEEDED, "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_sentence(flags: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")) as caught:
        parse(flags)
    assert "\n" not in str(caught.value)


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shells leave it alone in --output-dir=~/out, which would make a folder called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    options = parse([*NEEDED, "--output-dir=~/out", "--data-dir=~/data"])
    assert (options.output_dir, options.data_dir) == (tmp_path / "out", tmp_path / "data")


def test_columns_are_those_of_one_s_own_data() -> None:
    options = parse([*CUSTOM, "--text-columns", "question", "answer", "--label-column", "right"])
    assert (options.text_columns, options.label_column) == (("question", "answer"), "right")
    unnamed = parse(CUSTOM)
    assert (unnamed.text_columns, unnamed.label_column) == (None, None)
    assert unnamed.identity(0.5) != options.identity(0.5), "other columns make another output"


def test_options_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        parse(NEEDED).model = "other"  # type: ignore[misc]


def test_options_are_the_flags() -> None:
    """A flag that is parsed and then forgotten would silently do nothing."""
    from rfprune import measure, run

    files = (run.__file__, measure.__file__)
    source = "".join(Path(file).read_text(encoding="utf-8") for file in files)
    used_when_parsed = {"constraint", "output_dir", "overwrite"}
    for name in set(Options.__dataclass_fields__) - used_when_parsed:
        assert f"options.{name}" in source, name
