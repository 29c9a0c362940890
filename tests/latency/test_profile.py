"""Profiling: the table of every family predicts its pruned models, and the model stays unchanged.

Times are not judged. Where numbers matter, floating-point operations replace milliseconds, since
they are exact.

Without these tests, a table could leave out the rest of the model, count a sublayer twice, or
measure modules that no pruned model has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rfprune.errors import UserError
from rfprune.latency.profile import measured_sizes, profile_latency, rounding
from rfprune.latency.table import LatencyTable, check_table, latency_costs
from rfprune.latency.timing import Timing, TimingBudget
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of
from rfprune.model.masks import num_kept
from tests.conftest import ALL_TYPES, AUDIO_TYPES, ENCODER_DECODER_TYPES, predictions

Tiny = Callable[..., Any]
PROFILED = tuple(model_type for model_type in ALL_TYPES if model_type not in ENCODER_DECODER_TYPES)


def flops(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of floating-point operations replace milliseconds."""

    def count(calls: Sequence[Callable[[], object]], *_: Any, **__: Any) -> list[Timing]:
        return [Timing(flops(call) / 1000, 0.01, 3) for call in calls]

    monkeypatch.setattr("rfprune.latency.profile.time_interleaved", count)


def eager(model: Any) -> Any:
    """The counter misses the fused attention of a CPU."""
    model.set_attn_implementation("eager")
    return model


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("model_type", PROFILED)
def test_a_table_predicts_the_work_of_pruned_models(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model, batch = eager(tiny_model(model_type)), tiny_batch(model_type=model_type)
    layout = layout_of(model)
    table = profile_latency(model, layout, batch)
    costs = latency_costs(table, layout)
    assert costs.original == pytest.approx(flops(lambda: model(**batch)) / 1000)
    assert table.scale == pytest.approx(1), "sublayers and the rest add up to the model"
    # granite has the head of a language model, SigLIP a pooler that is as large as a layer, and
    # audio models have convolutions
    head = 0.5 if model_type in ("granite", "siglip_vision_model", *AUDIO_TYPES) else 0.2
    assert (table.rest_ms > 0) == (model_type != "clip_text_model")  # whose rest is embeddings
    assert table.rest_ms < head * table.total_ms
    for kept in ([0, 0, 0, 0], [3, 5, 1, 12], [0, 12, 4, 0]):
        masks = [
            (torch.arange(block.num_units) < units).float()
            for block, units in zip(layout.blocks, kept, strict=True)
        ]
        left = num_kept(masks)
        small = compact(model, layout, masks)
        done = flops(lambda small=small: small(**batch)) / 1000  # type: ignore[misc]
        assert costs.total(left) == pytest.approx(done)
        assert done < 0.95 * costs.original


@pytest.mark.usefixtures("counted")
def test_a_pruned_model_is_profiled_too(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    """Blocks of several sizes are points on the curve of the largest; an emptied one has none."""
    dense, batch = eager(tiny_model(num_hidden_layers=3)), tiny_batch()
    masks = [torch.ones(block.num_units) for block in layout_of(dense).blocks]
    masks[0][:] = masks[1][:4] = masks[2][1:] = masks[5][:] = 0
    model = compact(dense, layout_of(dense), masks)
    layout = layout_of(model)
    table = profile_latency(model, layout, batch)
    assert [(curve.kind, curve.num_units) for curve in table.curves] == [
        ("neuron", 12),
        ("head", 4),
    ]
    costs = latency_costs(table, layout)
    assert costs.original == pytest.approx(flops(lambda: model(**batch)) / 1000)
    assert [len(costs_of_block) - 1 for costs_of_block in costs.tables] == [8, 1, 12, 4]


@pytest.mark.parametrize("model_type", PROFILED)
def test_every_size_is_measured_and_the_model_stays_unchanged(
    model_type: str, tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model = tiny_model(model_type).train()
    batch = tiny_batch(2, 5, padding="none", model_type=model_type)
    layout = layout_of(model)
    model(**batch)  # some models keep hooks of transformers' own
    before = state_of(model)
    with torch.inference_mode():
        table = profile_latency(model, layout, batch, budget=TimingBudget(0, min_rounds=1))
    output = model(**batch)
    predictions(output).sum().backward()  # nothing that was measured prevents training
    model.zero_grad()
    assert state_of(model) == before
    heads, neurons = table.curves
    assert (heads.kind, heads.sizes) == ("head", tuple(range(layout.blocks[0].num_units + 1)))
    width = layout.blocks[1].num_units
    assert (neurons.kind, neurons.sizes) == ("neuron", tuple(range(width + 1)))
    assert table.rounds == 1
    # of images four patches, a class token and the further tokens of some models
    tokens = {"deit": 6, "dinov2_with_registers": 9, "siglip_vision_model": 4}.get(model_type, 5)
    assert (table.conditions.batch_size, table.conditions.sequence_length) == (2, tokens)
    assert latency_costs(table, layout).original == pytest.approx(table.total_ms)
    check_table(table, model, layout, table.conditions)


def test_an_interruption_leaves_the_model_unchanged(
    tiny_model: Tiny, tiny_batch: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(calls: Sequence[Callable[[], object]], *_: Any, **__: Any) -> list[Timing]:
        for call in calls:
            call()
        raise KeyboardInterrupt

    monkeypatch.setattr("rfprune.latency.profile.time_interleaved", interrupted)
    model = tiny_model().train()
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        profile_latency(model, layout_of(model), tiny_batch())
    assert state_of(model) == before


def state_of(model: Any) -> list[Any]:
    """Weights and their storage, modes, hooks, gradients, class and configuration."""
    modules = [
        (name, id(each), each.training, len(each._forward_pre_hooks), len(each._forward_hooks))
        for name, each in model.named_modules()
    ]
    weights = [
        (name, each.data_ptr(), each.sum().item(), each.requires_grad, each.is_inference())
        for name, each in model.named_parameters()
    ]
    return [type(model), model.config.to_json_string(), modules, weights]


def test_if_sublayers_take_no_measurable_time_nothing_can_be_saved(
    tiny_model: Tiny, tiny_batch: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU where kernel-launch overhead dominates."""

    def constant(calls: Sequence[Any], *_: Any, **__: Any) -> list[Timing]:
        return [Timing(5.0, 0.01, 3)] * len(calls)

    monkeypatch.setattr("rfprune.latency.profile.time_interleaved", constant)
    model = tiny_model()
    layout = layout_of(model)
    table = profile_latency(model, layout, tiny_batch())
    costs = latency_costs(table, layout)
    assert (table.rest_ms, table.total_ms, costs.original) == (5, 5, 5)
    assert costs.total([1, 2, 3, 4]) == 5


def test_wide_layers_are_measured_at_few_sizes_and_allowed_at_all_multiples(
    tiny_model: Tiny,
) -> None:
    head, neuron = layout_of(tiny_model(intermediate_size=3072)).blocks[:2]
    assert rounding(neuron, None) == 32
    assert measured_sizes(neuron, 32) == list(range(0, 3073, 128))
    assert measured_sizes(neuron, 64) == list(range(0, 3073, 128))
    assert len(measured_sizes(neuron, 1)) <= 26
    assert (rounding(head, 64), measured_sizes(head, 1)) == (1, [0, 1, 2, 3, 4])
    odd = layout_of(tiny_model(intermediate_size=1000)).blocks[1]
    assert rounding(odd, None) == 16
    assert measured_sizes(odd, 100) == [*range(0, 1000, 100), 1000]


@pytest.mark.usefixtures("counted")
def test_round_to_sets_the_multiples_that_are_allowed(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model = tiny_model()
    table = profile_latency(model, layout_of(model), tiny_batch(), round_to=5)
    assert table.curves[1].sizes == (0, 5, 10, 12)
    assert [curve.round_to for curve in table.curves] == [1, 5]


def test_a_request_that_cannot_be_measured_is_refused(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model = tiny_model()
    with pytest.raises(UserError, match="multiples of 0"):
        profile_latency(model, layout_of(model), tiny_batch(), round_to=0)
    empty = compact(
        model, layout_of(model), [torch.zeros(b.num_units) for b in layout_of(model).blocks]
    )
    with pytest.raises(UserError, match="no heads or neurons left"):
        profile_latency(empty, layout_of(empty), tiny_batch())
    bart = tiny_model("bart")
    with pytest.raises(UserError, match=r"encoder-decoder.*another metric"):
        profile_latency(bart, layout_of(bart), tiny_batch(model_type="bart"))


@pytest.mark.cuda
def test_profiling_on_a_gpu(tiny_model: Tiny, tiny_batch: Tiny) -> None:
    model = tiny_model().to("cuda")
    layout = layout_of(model)
    before = state_of(model)
    table: LatencyTable = profile_latency(
        model, layout, tiny_batch(), budget=TimingBudget(1, min_rounds=3)
    )
    assert state_of(model) == before
    assert table.conditions.device == "cuda"
    assert table.conditions.device_name == torch.cuda.get_device_name()
    assert latency_costs(table, layout).original == pytest.approx(table.total_ms)
