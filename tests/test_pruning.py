"""prune() meets its budget, returns a working model and leaves the original untouched.

Deleting this lets a constraint be missed, a family differ from single runs, or a user's model be
changed.
"""

from __future__ import annotations

import contextlib
import doctest
import inspect
import itertools
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from rfprune.cost.constraint import Constraint
from rfprune.cost.macs import total_macs
from rfprune.cost.memory import total_bytes
from rfprune.cost.params import total_params
from rfprune.errors import UserError
from rfprune.latency.timing import TimingBudget
from rfprune.model.batch import mean_tokens
from rfprune.model.checkpoint import load_pruned
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of
from rfprune.model.masks import masked, num_kept
from rfprune.pruning import prune, prune_family, schedule
from rfprune.result import PruneResult
from rfprune.settings import METHODS, Settings
from tests.conftest import MODEL_TYPES

Tiny = Callable[..., Any]
Batch = dict[str, Tensor]
KWON = Settings(method="kwon")
HALF = Constraint("mac", 0.5)


@pytest.fixture(params=METHODS)
def settings(request: pytest.FixtureRequest) -> Settings:
    return Settings(method=request.param, round_to=None)


@pytest.fixture
def batches(tiny_batch: Tiny) -> list[Batch]:
    return [tiny_batch(6, 7 + seed, seed=seed) for seed in range(3)]


def logits_of(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]  # type: ignore[no-any-return]


def assert_same_models(one: PruneResult, other: PruneResult, batch: Batch) -> None:
    """To the last bit."""
    assert all(torch.equal(*pair) for pair in zip(one.masks, other.masks, strict=True))
    assert torch.equal(logits_of(one.model, batch), logits_of(other.model, batch))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that pruning might disturb."""
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "identity": [id(parameter) for parameter in model.parameters()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        ],
        "class": type(model),
        "config": str(model.config),
    }


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    for name, value in left["weights"].items():
        assert torch.equal(value, right["weights"][name]), name
    for key in set(left) - {"weights"}:
        assert left[key] == right[key], key


@pytest.mark.parametrize("head", ["sequence-classification", "question-answering"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_is_pruned_and_reloads(
    model_type: str,
    head: str,
    settings: Settings,
    tiny_model: Tiny,
    batches: list[Batch],
    tmp_path: Path,
) -> None:
    model = tiny_model(model_type, head)
    result = prune(model, batches, HALF, settings)
    assert result.warnings == ()
    assert result.achieved["mac"] <= 0.5
    assert total_params(result.model) < total_params(model)
    result.model.save_pretrained(tmp_path)
    expected = logits_of(result.model, batches[0])
    assert torch.equal(logits_of(load_pruned(tmp_path), batches[0]), expected)
    heads = {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "question-answering": transformers.AutoModelForQuestionAnswering,
    }
    with_code = heads[head].from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(logits_of(with_code, batches[0]), expected)


@pytest.mark.parametrize(
    ("metric", "ratio"), [("mac", 0.7), ("mac", 0.3), ("params", 0.9), ("memory", 0.9)]
)
def test_the_budget_is_met_by_the_model_itself(
    metric: str, ratio: float, settings: Settings, tiny_model: Tiny, batches: list[Batch]
) -> None:
    model = tiny_model()
    result = prune(model, batches, Constraint(metric, ratio), settings)
    tokens = mean_tokens(batches)
    real = {
        "mac": total_macs(layout_of(result.model), tokens) / total_macs(layout_of(model), tokens),
        "params": total_params(result.model) / total_params(model),
        "memory": total_bytes(result.model) / total_bytes(model),
    }
    assert result.achieved == pytest.approx(real)
    assert ratio - 0.1 < real[metric] <= ratio
    assert result.mean_tokens == tokens
    kept = [count for layer in result.layers for count in (layer["heads"], layer["neurons"])]
    assert tuple(kept) == num_kept(result.masks)


@pytest.mark.parametrize(
    "settings",
    [
        KWON,
        replace(KWON, rounds=2),
        Settings(method="importance", tune=False),
        Settings(tune=False, rounds=3),
    ],
    ids=str,
)
def test_masks_describe_the_pruned_model(
    settings: Settings, tiny_model: Tiny, batches: list[Batch]
) -> None:
    """With their scales, after all rounds; without tuning no weight that stays has changed."""
    model = tiny_model()
    result = prune(model, batches, HALF, settings)
    scaled = any(((mask != 0) & (mask != 1)).any() for mask in result.masks)
    assert scaled is (settings.method == "kwon")
    with masked(model, result.layout, result.masks):
        expected = logits_of(model, batches[0])
    assert (expected - logits_of(model, batches[0])).abs().max() > 0.01
    torch.testing.assert_close(logits_of(result.model, batches[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_original_is_untouched(
    mode: str, settings: Settings, tiny_model: Tiny, batches: list[Batch]
) -> None:
    model = tiny_model().train(mode == "train")
    model.bert.embeddings.requires_grad_(False)
    model.classifier.register_forward_hook(lambda *_: None)
    before = fingerprint(model)
    result = prune(model, batches, HALF, settings)
    assert_same(before, fingerprint(model))
    assert all(module.training == (mode == "train") for module in result.model.modules())
    assert not result.model.bert.embeddings.word_embeddings.weight.requires_grad
    assert result.model.classifier.weight.requires_grad
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.zero_()
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("place", ["collect", "compact", "reconstruct", "last batch"])
def test_the_original_is_untouched_after_an_error(
    place: str,
    settings: Settings,
    tiny_model: Tiny,
    batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model().train()
    before = fingerprint(model)

    def fail(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    if place == "collect":
        monkeypatch.setattr("rfprune.stages.objective.fisher_factors", fail)
    elif place == "compact":
        monkeypatch.setattr("rfprune.pruning.compact", fail)
    elif place == "reconstruct":
        monkeypatch.setattr("rfprune.stages.hidden_states.trace_block", fail)
    else:
        batches[-1] = {"input_ids": torch.full((1, 2), 10**6)}
    with pytest.raises((KeyboardInterrupt, UserError)):
        prune(model, batches, HALF, settings)
    assert_same(before, fingerprint(model))


CIRCUMSTANCES = ("other random state", "generator", "nonsense labels", "no_grad", "inference_mode")


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
def test_the_result_does_not_depend_on(
    circumstance: str, settings: Settings, tiny_model: Tiny, batches: list[Batch]
) -> None:
    expected = prune(tiny_model(), batches, HALF, settings)
    given: Any = batches
    mode: Any = contextlib.nullcontext()
    if circumstance == "generator":
        given = iter(batches)
    elif circumstance == "nonsense labels":
        given = [{**batch, "labels": torch.full((6,), 77)} for batch in batches]
    elif circumstance != "other random state":
        mode = getattr(torch, circumstance)()
    model = tiny_model()
    with torch.random.fork_rng(devices=[]), mode:
        torch.manual_seed(99)
        before = random.getstate(), torch.is_grad_enabled(), torch.random.get_rng_state().tolist()
        result = prune(model, given, HALF, settings)
        after = random.getstate(), torch.is_grad_enabled(), torch.random.get_rng_state().tolist()
        assert after == before
    assert_same_models(result, expected, batches[0])
    result.model(**batches[0]).logits.sum().backward()  # its weights are ordinary tensors


def test_a_family_is_its_single_runs(
    settings: Settings, tiny_model: Tiny, batches: list[Batch]
) -> None:
    constraints = [Constraint("mac", 0.7), Constraint("params", 0.92), Constraint("mac", 0.3)]
    model = tiny_model()
    family = list(prune_family(model, batches, constraints, settings))
    assert [result.constraint for result in family] == constraints
    outputs = []
    for constraint, member in zip(constraints, family, strict=True):
        assert_same_models(member, prune(model, batches, constraint, settings), batches[0])
        outputs.append(logits_of(member.model, batches[0]))
    assert not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("kind", ["left padded", "unmasked", "embedded", "one", "tuples"])
def test_batches_of_every_kind(
    kind: str, settings: Settings, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model = tiny_model()
    batch = tiny_batch(8, padding="left" if kind == "left padded" else "none")
    if kind == "unmasked":
        del batch["attention_mask"]
    elif kind == "embedded":
        ids = batch.pop("input_ids")
        batch["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    elif kind == "one":
        batch = tiny_batch(1)
    elif kind == "tuples":
        model.config.return_dict = False
    result = prune(model, [batch], HALF, settings)
    assert result.achieved["mac"] <= 0.5
    assert torch.isfinite(logits_of(result.model, batch)).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_labels": 1},
        {"num_labels": 3},
        {"num_labels": 20},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"num_labels": 2, "problem_type": "regression"},
        {"num_hidden_layers": 1},
        {"head": "none"},
    ],
    ids=str,
)
def test_models_of_every_kind(
    changes: dict[str, Any], settings: Settings, tiny_model: Tiny, batches: list[Batch]
) -> None:
    model = tiny_model(**changes)
    result = prune(model, batches, HALF, settings)
    assert 0.3 < result.achieved["mac"] <= 0.5
    assert logits_of(result.model, batches[0]).shape == logits_of(model, batches[0]).shape


@pytest.mark.cuda
def test_on_a_gpu(settings: Settings, tiny_model: Tiny, batches: list[Batch]) -> None:
    expected = prune(tiny_model(), batches, HALF, settings)
    result = prune(tiny_model().cuda(), batches, HALF, settings)  # the batches are taken along
    assert {parameter.device.type for parameter in result.model.parameters()} == {"cuda"}
    assert num_kept(result.masks) == num_kept(expected.masks)
    on_gpu = logits_of(result.model, {name: value.cuda() for name, value in batches[0].items()})
    on_cpu = logits_of(expected.model, batches[0])
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-2, atol=1e-2)


def test_half_precision(settings: Settings, tiny_model: Tiny, batches: list[Batch]) -> None:
    result = prune(tiny_model().to(torch.bfloat16), batches, HALF, settings)
    assert result.achieved["mac"] <= 0.5
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits_of(result.model, batches[0])).all()


@pytest.mark.parametrize("gone", ["head", "neuron", "head and neuron"])
def test_a_model_without_heads_or_without_neurons_is_pruned_again(
    gone: str, settings: Settings, tiny_model: Tiny, batches: list[Batch]
) -> None:
    model = tiny_model()
    layout = layout_of(model)
    masks = [torch.full((b.num_units,), float(b.kind not in gone)) for b in layout.blocks]
    emptied = compact(model, layout, masks)
    if gone == "head and neuron":
        with pytest.raises(UserError, match="nothing to prune.*a model with heads or neurons"):
            prune(emptied, batches, HALF, settings)
        return
    result = prune(emptied, batches, HALF, settings)
    assert result.achieved["mac"] <= 0.5
    assert [layer[f"{gone}s"] for layer in result.layers] == [0, 0]


def test_every_stage_takes_as_long_in_a_family_as_alone(
    settings: Settings,
    tiny_model: Tiny,
    batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measured by a clock that ticks at every look."""
    ticking = SimpleNamespace(perf_counter=itertools.count(0.0).__next__)
    monkeypatch.setattr("rfprune.result.time", ticking)
    model = tiny_model()
    family = list(prune_family(model, batches, [HALF, Constraint("mac", 0.3)], settings))
    alone = prune(model, batches, HALF, settings)
    assert family[0].seconds == family[1].seconds == alone.seconds
    # kwon: the gradients, and their squares; curvature: four blocks, and the end
    ticks = {"kwon": 2, "curvature": 5}.get(settings.method, 1)
    assert alone.seconds["collect"] == ticks
    stages = {name: value for name, value in alone.seconds.items() if name != "prune_total"}
    assert {"search", "compact", "tune"} <= set(stages)
    assert alone.seconds["prune_total"] == pytest.approx(sum(stages.values()))


@pytest.mark.parametrize("metric", ["mac", "params", "memory"])
def test_rounds_meet_the_same_constraint_and_their_masks_tell_what_is_left(
    settings: Settings, metric: str, tiny_model: Tiny, batches: list[Batch]
) -> None:
    model = tiny_model()
    constraint = Constraint(metric, 0.4 if metric == "mac" else 0.9)
    once = prune(model, batches, constraint, replace(settings, tune=False))
    rounds = prune(model, batches, constraint, replace(settings, tune=False, rounds=3))
    assert rounds.achieved[metric] <= constraint.ratio
    assert once.achieved[metric] == pytest.approx(rounds.achieved[metric], abs=0.1)
    kept = list(zip(rounds.layout.blocks, num_kept(rounds.masks), strict=True))
    assert [(b.layer, b.kind, n) for b, n in kept if n] == [
        (block.layer, block.kind, block.num_units) for block in layout_of(rounds.model).blocks
    ]


def test_a_latency_is_profiled_and_measured_in_every_round(
    tiny_model: Tiny, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfprune.latency.profile.BUDGET", TimingBudget(0.5, 3))
    monkeypatch.setattr("rfprune.latency.speedup.RATIO_BUDGET", TimingBudget(0.0, 2))
    settings = Settings(rounds=2, round_to=None, tune=False)
    result = prune(tiny_model(), batches, Constraint("latency", 0.9), settings)
    assert result.promise is not None
    assert result.achieved["latency"] == result.promise.measured
    assert result.achieved["mac"] < 1
    assert result.seconds["verify"] > 0
    assert num_kept(result.masks) == result.promise.attempts[result.promise.chosen].kept


def test_every_round_removes_the_same_fraction() -> None:
    assert schedule(0.25, 1) == [0.25]
    assert schedule(0.125, 3) == pytest.approx([0.5, 0.25, 0.125])


def test_weights_that_are_not_finite_are_named(
    settings: Settings, tiny_model: Tiny, batches: list[Batch]
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.bias[3] = torch.nan
    with pytest.raises(UserError, match=r"layer\.1\.output\.dense\.bias' holds NaN"):
        prune(model, batches, HALF, settings)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "nothing to calibrate on"),
        ([{"input_ids": torch.zeros(0, 4, dtype=torch.long)}], "no example or no token"),
        ([torch.zeros(2, 3)], "a batch must map names to tensors"),
        ([{"input_ids": [[1, 2]]}], "a batch must map names to tensors"),
        ([{"labels": torch.zeros(2)}], "a model needs input_ids"),
    ],
    ids=["none", "empty", "tensor", "list", "labels alone"],
)
def test_batches_that_are_none_are_refused(
    bad: Any, message: str, settings: Settings, tiny_model: Tiny
) -> None:
    with pytest.raises(UserError, match=message):
        prune(tiny_model(), bad, HALF, settings)


@pytest.mark.parametrize("documented", [prune, prune_family, PruneResult.save])
def test_the_examples_of_the_documentation_run(
    documented: Callable[..., Any],
    tiny_model: Tiny,
    tiny_tokenizer: Tiny,
    batches: list[Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = prune(tiny_model(), batches, HALF)
    names = {"result": result, "tokenizer": tiny_tokenizer()}
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, globs=names)
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.tries > 2
    assert runner.failures == 0


def test_a_family_takes_the_arguments_that_prune_explains() -> None:
    """So the documentation of one serves both."""
    one, family = (dict(inspect.signature(f).parameters) for f in (prune, prune_family))
    del one["constraint"], family["constraints"]
    assert [str(parameter) for parameter in one.values()] == [
        str(parameter) for parameter in family.values()
    ]
    explained = str(prune.__doc__).partition("Args:")[2].partition("Returns:")[0]
    names = list(inspect.signature(prune).parameters)
    assert re.findall(r"^ {8}(\w+):", explained, re.MULTILINE) == names
