"""Latency tables: the cost of every size, the check of model and conditions, and the file format.

Without these tests, a table of another model or machine could be used without a warning, a damaged
file could end in a traceback, and interpolated times could contradict the measured ones.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfprune.errors import RfpruneWarning, UserError
from rfprune.latency.conditions import Conditions, conditions_of
from rfprune.latency.table import (
    BlockShape,
    LatencyCurve,
    LatencyTable,
    ModelShape,
    check_table,
    latency_costs,
)
from rfprune.model.compact import compact
from rfprune.model.layout import Layout, layout_of

Tiny = Callable[..., Any]

CONDITIONS = Conditions(
    device="cpu",
    device_name="Some CPU",
    platform="Linux x86_64",
    torch="2.13.0",
    transformers="5.23.0",
    dtype="float32",
    batch_size=4,
    sequence_length=7,
    attention="sdpa",
    threads=2,
    padded=False,
)
HEADS = LatencyCurve("head", 16, 4, 1, (0, 1, 2, 3, 4), (0.0, 2.0, 3.0, 5.5, 5.0), (0.01,) * 5)
NEURONS = LatencyCurve("neuron", 16, 1, 2, (0, 4, 8, 12), (0.0, 2.0, 1.8, 3.0), (0.02,) * 4)
BLOCKS = tuple(
    BlockShape(layer, kind, units, width)
    for layer in (0, 1)
    for kind, units, width in (("head", 4, 4), ("neuron", 12, 1))
)
TABLE = LatencyTable(
    model=ModelShape("bert", 16, BLOCKS),
    conditions=CONDITIONS,
    total_ms=20.0,
    total_spread=0.03,
    rest_ms=4.0,
    curves=(HEADS, NEURONS),
    scale=0.95,
    rounds=7,
)


@pytest.fixture(scope="module")
def layout(tiny_model: Tiny) -> Layout:
    return layout_of(tiny_model())


def test_all_units_cost_the_total_and_no_units_the_rest(layout: Layout) -> None:
    costs = latency_costs(TABLE, layout)
    assert costs.metric == "latency"
    assert costs.original == pytest.approx(TABLE.total_ms)
    assert costs.total([4, 12, 4, 12]) == pytest.approx(20)
    assert costs.total([0, 0, 0, 0]) == TABLE.rest_ms
    with_layers = latency_costs(replace(TABLE, layer_ms=1.5), layout)
    assert with_layers.total([0, 0, 0, 0], removed=[1]) == TABLE.rest_ms - 1.5
    assert with_layers.without_layers([1]).original == costs.original
    assert costs.total([1, 12, 0, 4]) == pytest.approx(4 + 2 + 3 + 0 + 1.9)


def test_complete_measurements_are_kept_and_dips_between_others_are_noise() -> None:
    assert HEADS.costs(4).tolist() == [0, 2, 3, 5.5, 5]
    assert NEURONS.costs(12)[[0, 2, 4, 6, 8, 10, 12]] == pytest.approx(
        [0, 0.95, 1.9, 1.9, 1.9, 2.45, 3]
    )
    assert np.isfinite(NEURONS.costs(11)).tolist() == [True, False] * 5 + [True, True]
    rising = LatencyCurve("neuron", 16, 1, 1, (0, 4, 5, 12), (0.0, 1.0, 3.0, 3.0), (0.0,) * 4)
    assert rising.costs(12)[[0, 4, 5, 12]].tolist() == [0, 1, 3, 3]


@st.composite
def curves(draw: st.DrawFn) -> LatencyCurve:
    """Some of the sizes up to 60, with any times."""
    num_units = draw(st.integers(4, 60))
    inner = draw(st.sets(st.integers(1, num_units - 1), max_size=num_units - 2))
    sizes = (0, *sorted(inner), num_units)
    ms = (0.0, *(draw(st.floats(0, 100)) for _ in sizes[1:]))
    round_to = draw(st.integers(1, num_units))
    return LatencyCurve("neuron", 16, 1, round_to, sizes, ms, (0.0,) * len(sizes))


@given(curves())
def test_interpolated_times_are_monotone_and_exact_at_both_ends(curve: LatencyCurve) -> None:
    costs = curve.costs(curve.num_units)
    assert costs.shape == (curve.num_units + 1,)
    assert (costs[0], costs[-1]) == (0, curve.ms[-1])
    allowed = costs[np.isfinite(costs)]
    assert (allowed >= 0).all()
    assert (np.diff(allowed) >= -1e-12).all()
    units = np.arange(curve.num_units + 1)
    expected = (units % curve.round_to == 0) | (units == curve.num_units)
    assert (np.isfinite(costs) == expected).all()


def test_a_model_pruned_from_the_measured_one_has_its_times_in_the_table(tiny_model: Tiny) -> None:
    model = tiny_model()
    masks = [torch.tensor([1.0, 0, 1, 1]), torch.ones(12), torch.zeros(4), torch.ones(12)]
    masks[1][:5] = 0
    small = layout_of(compact(model, layout_of(model), masks))
    costs = latency_costs(TABLE, small)
    assert [len(table) for table in costs.tables] == [4, 8, 13]
    seven_neurons = 1.9  # as 4 and 8 neurons, made monotone
    assert costs.original == pytest.approx(TABLE.rest_ms + 5.5 + seven_neurons + 3)
    assert costs.tables[1][7] == pytest.approx(seven_neurons)


@pytest.mark.parametrize("shape", [{"num_attention_heads": 2}, {"intermediate_size": 13}])
def test_a_block_without_times_is_named(tiny_model: Tiny, shape: dict[str, int]) -> None:
    name = "layer.0.heads" if "num_attention_heads" in shape else "layer.0.neurons"
    with pytest.raises(UserError, match=rf"no times for {name} .*another model"):
        latency_costs(TABLE, layout_of(tiny_model(**shape)))


def test_conditions_are_those_of_the_model_and_the_batch(
    tiny_model: Tiny, tiny_batch: Tiny
) -> None:
    model = tiny_model().to(torch.bfloat16)
    found = conditions_of(model, layout_of(model), tiny_batch(3, 9))
    assert (found.batch_size, found.sequence_length, found.padded) == (3, 9, True)
    assert (found.device, found.dtype, found.attention) == ("cpu", "bfloat16", "sdpa")
    assert (found.torch, found.threads) == (torch.__version__, torch.get_num_threads())
    assert found.device_name
    assert not conditions_of(model, layout_of(model), tiny_batch(3, 9, padding="none")).padded


REFUSED: dict[str, tuple[Any, str]] = {
    "device": ("cuda", "device cpu, not cuda"),
    "dtype": ("float16", "dtype float32, not float16"),
    "batch_size": (8, "batch size 4, not 8"),
    "sequence_length": (9, "sequence length 7, not 9"),
    "attention": ("eager", "attention implementation sdpa, not eager"),
}
WARNED: dict[str, tuple[Any, str]] = {
    "device_name": ("Another CPU", "machine Some CPU, not Another CPU"),
    "platform": ("Darwin arm64", "platform Linux x86_64, not Darwin arm64"),
    "torch": ("9.9", "torch version 2.13.0, not 9.9"),
    "transformers": ("9.9", "transformers version 5.23.0, not 9.9"),
    "threads": (1, "number of threads 2, not 1"),
    "padded": (True, "padding False, not True"),
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Conditions)])
def test_each_other_condition_is_refused_or_warned_about_by_name(
    field: str, tiny_model: Tiny
) -> None:
    value, name = (REFUSED | WARNED)[field]
    conditions = replace(CONDITIONS, **{field: value})
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_table(TABLE, model, layout_of(model), CONDITIONS)
    outcome = (
        pytest.raises(UserError, match=f"{name}.*profile_latency")
        if field in REFUSED
        else pytest.warns(RfpruneWarning, match=name)
    )
    with outcome:
        check_table(TABLE, model, layout_of(model), conditions)


def test_all_refused_conditions_are_named(tiny_model: Tiny) -> None:
    model, other = tiny_model(), replace(CONDITIONS, batch_size=8, dtype="float16")
    with pytest.raises(UserError, match="float16 and batch size 4, not 8"):
        check_table(TABLE, model, layout_of(model), other)


@pytest.mark.parametrize(
    ("model_type", "shape", "name"),
    [
        ("bert", {"num_hidden_layers": 3}, "3 layers of 4 heads and 12 neurons"),
        ("bert", {"hidden_size": 32}, "hidden size 32"),
        ("bert", {"intermediate_size": 10}, "2 layers of 4 heads and 10 neurons"),
        ("roberta", {}, "RobertaForSequenceClassification is roberta"),
    ],
    ids=str,
)
def test_another_model_is_refused(
    tiny_model: Tiny, model_type: str, shape: dict[str, int], name: str
) -> None:
    model = tiny_model(model_type, **shape)
    with pytest.raises(
        UserError, match=rf"another model: bert, hidden size 16.*{name}.*profile_latency"
    ):
        check_table(TABLE, model, layout_of(model), CONDITIONS)


def test_a_saved_table_loads_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("an older one")
    table = replace(TABLE, rest_ms=4.0 + 1e-13)  # to the last bit
    table.save(path)
    assert LatencyTable.load(path) == table != TABLE
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"
    assert json.loads(path.read_text())["conditions"]["device_name"] == "Some CPU"


def test_an_interrupted_save_leaves_the_existing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    path.write_text("an older one")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TABLE.save(path)
    assert path.read_text() == "an older one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="table.json' cannot be written .*choose"):
        TABLE.save(tmp_path / "no" / "table.json")


def damaged(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the entry at `keys` to another value; None removes it."""

    def change(entries: dict[str, Any]) -> None:
        place: Any = entries
        for key in keys[:-1]:
            place = place[key]
        if to is None:
            del place[keys[-1]]
        else:
            place[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (damaged("format", to="something"), "is not a latency table"),
        (damaged("format_version", to=2), "format version 2, but only 1 is supported"),
        (damaged("format_version", to=True), "format version True"),
        (damaged("rest_ms", to=None), "missing or unknown entries: rest_ms"),
        (damaged("more", to=1), "missing or unknown entries: more"),
        (damaged("rest_ms", to="4"), "rest_ms is '4', not of type float"),
        (damaged("rest_ms", to=float("nan")), "rest_ms is nan"),
        (damaged("rest_ms", to=10**400), "rest_ms is inf"),
        (damaged("rest_ms", to=True), "rest_ms is True, not of type float"),
        (damaged("rest_ms", to=-1.0), "rest_ms is -1.0, not between"),
        (damaged("rest_ms", to=21.0), "rest_ms is 21.0, not between"),
        (damaged("rest_ms", to=5.0), "add up to 21 ms, not to 20"),
        (damaged("rounds", to=0), "rounds.* below 1"),
        (damaged("conditions", to=[]), "conditions is not an object"),
        (damaged("conditions", "padded", to=0), "padded is 0, not of type bool"),
        (damaged("model", "blocks", to={}), "blocks is not a list"),
        (damaged("model", "blocks", to=[]), "no sublayers"),
        (damaged("model", "blocks", 1, "num_units", to=13), "no times for the neurons of layer 0"),
        (damaged("curves", 0, "ms", to=[0.0]), "curve of heads has lists of unequal length"),
        (damaged("curves", 0, "ms", 1, to=-2.0), "negative times"),
        (damaged("curves", 0, "ms", 0, to=1.0), "other than 0 at size 0"),
        (damaged("curves", 0, "spreads", 1, to=-2.0), "negative times"),
        (damaged("curves", 0, "sizes", 1, to=2), "do not increase from 0"),
        (damaged("curves", 0, "sizes", 0, to=-1), "do not increase from 0"),
        (damaged("curves", 0, "sizes", 1, to=1.0), r"sizes\[1\] is 1.0, not of type int"),
        (damaged("curves", 1, "round_to", to=0), "round_to.* below 1"),
    ],
)
def test_a_damaged_table_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], what: str
) -> None:
    path = tmp_path / "table.json"
    TABLE.save(path)
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=f"{what}.*profile_latency") as error:
        LatencyTable.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "damaged: it is not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"format": "rfprune latency', "not JSON"),
        (b"[]", "not a latency table"),
        (b"null", "not a latency table"),
        (None, "cannot be read.*profile_latency"),
    ],
    ids=["empty", "binary", "deep", "cut short", "list", "null", "missing"],
)
def test_a_file_that_is_not_a_table_is_refused(
    tmp_path: Path, content: bytes | None, what: str
) -> None:
    path = tmp_path / "table.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=what):
        LatencyTable.load(path)
