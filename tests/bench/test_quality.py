"""`scripts.bench.quality`: a line holds what the package measures, for the settings that it names.

Without these tests hours of measuring could score other settings than the tables say.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rfprune.cost.constraint import Constraint
from rfprune.errors import UserError
from rfprune.pruning import prune
from rfprune.settings import ALLOCATIONS, CRITERIA, Settings
from rfprune.tasks.bootstrap import paired_drop
from rfprune.tasks.calibration import calibration_batches
from rfprune.tasks.evaluation import divergence, evaluate_model, prepare_evaluation
from rfprune.tasks.registry import get_task
from scripts.bench import quality
from tests.bench.conftest import ReadLines
from tests.conftest import WORDS

Run = Callable[[str], int]


@pytest.fixture
def run(flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("--seed 0 1 ...")`; later flags win."""
    monkeypatch.setenv("RFPRUNE_CACHE", str(tmp_path / "cache"))
    return lambda more: quality.main(f"{flags} --device cpu --constraint 0.5 {more}".split())


def test_a_line_is_what_the_package_measures(
    run: Run,
    lines: ReadLines,
    tiny_folder: Callable[..., Path],
    tiny_model: Callable[..., Any],
    tiny_tokenizer: Callable[..., Any],
    tiny_data_dir: Path,
) -> None:
    more = "--variant kwon-rearrange --seed 3 --eval-limit 20 --metric params --constraint 0.9"
    assert run(more) == 0
    (line,) = lines()
    model, tokenizer, task = tiny_model(), tiny_tokenizer(), get_task("mrpc")
    batches = calibration_batches(
        task,
        tokenizer,
        tiny_data_dir,
        num_samples=16,
        batch_size=8,
        max_length=None,
        seed=3,
        with_labels=False,
    )
    settings = Settings(method="kwon", tune=False, seed=3)
    result = prune(model, batches, Constraint("params", 0.9), settings)
    data = prepare_evaluation(task, tokenizer, tiny_data_dir, limit=20)
    original, pruned = evaluate_model(model, data), evaluate_model(result.model, data)
    assert line["divergence"] == pytest.approx(divergence(original, pruned), rel=1e-4)
    assert line["divergence"] > 1e-3
    drop = paired_drop(data, original, pruned, 0.0)
    assert line["drop_error"] == pytest.approx(drop.standard_error)
    assert line["scores"] == {"original": original.scores, "pruned": pruned.scores}
    assert (line["score"], line["original_score"]) == (pruned.score, original.score)
    assert line["achieved"] == pytest.approx(result.achieved)
    assert line["layers"] == list(result.layers)
    assert line["seconds"]["prune_total"] > 0
    assert (line["samples"], line["evaluated_examples"]) == (16, 20)
    expected = {"variant": "kwon-rearrange", "seed": 3, "constraint": 0.9, "metric": "params"}
    assert expected.items() <= line.items()
    assert line["model"] == tiny_folder().name


def test_every_variant_runs_as_its_settings_say(run: Run, lines: ReadLines) -> None:
    assert run("") == 0
    variants = quality.SUITES["quality"].variants
    assert [line["variant"] for line in lines()] == list(variants)
    for line in lines():
        asked = dict(variants[line["variant"]])
        if "peer" in asked:
            asked = {"method": asked["peer"]}
        assert asked.items() <= line["settings"].items()
        assert ("tune" in line["seconds"]) == asked.get("tune", True)
        assert line["achieved"]["mac"] <= line["constraint"]
    own = [line for line in lines() if line["variant"] != "depth-joint"]  # may choose one of both
    assert len({line["divergence"] for line in own}) == len(own), "no two variants are the same"


def test_every_flag_is_a_condition() -> None:
    """Else a file could hold the result of other flags, and never be measured again."""
    suite = quality.SUITES["quality"]
    flags = "--model m --task rte --variant curvature --constraint 0.5"
    parse = quality.parser_for(suite).parse_args
    (usual,) = quality.wanted(parse(flags.split()), suite)
    changes = "--samples 8,--eval-limit 9,--batch-size 4,--max-length 8,--dtype bfloat16,--seed 1"
    for change in [*changes.split(","), "--metric params", "--task mrpc", "--model other"]:
        (other,) = quality.wanted(parse(f"{flags} {change}".split()), suite)
        assert sum(usual[name] != other[name] for name in usual) == 1, change


def test_one_variant_that_fails_leaves_the_others(
    run: Run,
    lines: ReadLines,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise UserError("no gradients today")

    monkeypatch.setattr("rfprune.methods.kwon.collect_gradients", fail)
    assert run("--variant kwon-search curvature-select") == 1
    assert [line["variant"] for line in lines()] == ["curvature-select"]
    assert "kwon-search: no gradients today" in capsys.readouterr().err


def test_warnings_are_in_the_line(run: Run, lines: ReadLines) -> None:
    assert run("--variant kwon-search --samples 60") == 0
    (line,) = lines()
    assert (line["samples"], line["requested_samples"]) == (48, 60)
    assert "only 48" in line["warnings"][0]


def test_every_criterion_is_in_the_ablation_without_and_with_the_fit() -> None:
    variants = quality.SUITES["ablation"].variants
    settings = {name: Settings(**asked) for name, asked in variants.items()}
    assert len(set(settings.values())) == len(variants), "no two variants are the same"
    for tune in (True, False):
        own = [one for one in settings.values() if one.tune == tune]
        one_shot = {(s.importance, s.allocation) for s in own if s.method == "importance"}
        assert one_shot == {(i, a) for i in CRITERIA for a in ALLOCATIONS}
        assert {s.method for s in own} == {"importance", "kwon", "curvature"}
        assert {s.importance for s in own if s.rounds > 1} == set(quality.IN_ROUNDS)
    assert all(name.endswith("-select") == (not own.tune) for name, own in settings.items())


def test_later_seeds_of_an_ablation_are_for_random_importance(run: Run, lines: ReadLines) -> None:
    chosen = "random-uniform random-uniform-select taylor-global taylor-global-rounds-3 curvature"
    assert run(f"--suite ablation --seed 0 1 --variant {chosen}") == 0
    found = [(line["seed"], line["variant"]) for line in lines()]
    assert found == [
        *((0, name) for name in chosen.split()),
        *((1, name) for name in chosen.split()[:2]),
    ]
    assert {line["settings"]["method"] for line in lines()} == {"importance", "curvature"}


def test_a_language_model_continues_prompts(
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    output: Path,
    lines: ReadLines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RFPRUNE_CACHE", str(tmp_path / "cache"))
    generator = random.Random(0)
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text(" ".join(generator.choices(WORDS, k=400)))
    flags = (
        f"--suite decoder --model {tiny_folder('gpt2', 'causal-lm')} --data-dir {tmp_path} "
        f"--output {output} "
        "--device cpu --constraint 0.7 --samples 8 --max-length 12 --eval-limit 4 "
        "--variant curvature magnitude-l2-select flap-select flap-published flap-refitted"
    )
    monkeypatch.setattr(quality, "PROMPTS", ("film",))
    assert quality.main(flags.split()) == 0
    found = lines()
    assert [line["variant"] for line in found[:2]] == ["curvature", "magnitude-l2-select"]
    assert {line["settings"]["method"] for line in found[2:]} == {"flap"}
    assert all(line["layers"] == found[2]["layers"] for line in found[2:]), "the same units"
    assert len({line["divergence"] for line in found[2:]}) == 3, "and other weights"
    for line in found:
        assert line.keys() == found[0].keys()
        assert line["achieved"]["mac"] <= 0.7
        assert line["metric_name"] == "perplexity"
        assert line["score"] != line["original_score"]
        assert line["evaluated_examples"] == 4
        assert line["written"].keys() == line["written_by_original"].keys() == {"film"}
        assert line["divergence"] > 0
        for model, score in (("original", line["original_score"]), ("pruned", line["score"])):
            assert len(line["nats"][model]) == 4
            assert math.exp(sum(line["nats"][model]) / 4) == pytest.approx(score, rel=1e-4)
        assert line["peak_memory_bytes"] > 1e7


def test_the_file_name_says_the_conditions(tmp_path: Path) -> None:
    suite = quality.SUITES["quality"]
    flags = ["--model", "user/name", "--task", "rte", "--constraint", "0.5", "--samples", "512"]
    options = quality.parser_for(suite).parse_args([*flags, "--eval-limit", "100"])
    expected = "quality_user--name_rte_mac_512samples_100evaluated.jsonl"
    assert quality.default_output(options).name == expected
    with pytest.raises(UserError, match="--output"):
        quality.default_output(quality.parser_for(suite).parse_args([*flags, "64"]))
