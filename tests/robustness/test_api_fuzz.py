"""prune() with any batches, settings and model states: a result, or one sentence.

Without this test a combination that no other test has could end in an error from inside torch, or
change the user's model.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfprune.cost.constraint import Constraint
from rfprune.errors import UserError
from rfprune.pruning import prune
from rfprune.settings import CRITERIA, METHODS, Settings
from tests.conftest import make_tiny_batch, make_tiny_model

FAMILIES = [
    ("bert", "sequence-classification"),
    ("bert", "question-answering"),
    ("bert", "none"),
    ("roberta", "sequence-classification"),
    ("distilbert", "sequence-classification"),
    ("deberta-v2", "sequence-classification"),
    ("gpt2", "causal-lm"),
    ("llama", "sequence-classification"),
    ("t5", "seq2seq-lm"),
    ("bart", "sequence-classification"),
    ("vit", "image-classification"),
]


def tie(model: Any) -> None:
    """Two projections of the same weights, which cannot be pruned apart."""
    linears = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    if len(linears) > 1 and linears[0].weight.shape == linears[1].weight.shape:
        linears[1].weight = linears[0].weight


STATES: dict[str, Callable[[Any], Any]] = {
    "train mode": lambda model: model.train(),
    "a layer in train mode": lambda model: next(iter(model.children())).train(),
    "no weight gradients": lambda model: model.requires_grad_(False),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float16": lambda model: model.half(),
    "float64": lambda model: model.double(),
    "a head in half precision": lambda model: list(model.children())[-1].half(),
    "hooks": lambda model: model.register_forward_hook(lambda *_: None),
    "input gradients": lambda model: model.enable_input_require_grads(),
    "checkpointing": lambda model: model.gradient_checkpointing_enable(),
    "gradients": lambda model: [
        setattr(weight, "grad", torch.ones_like(weight)) for weight in model.parameters()
    ],
    "tuples": lambda model: setattr(model.config, "return_dict", False),
    "hidden states": lambda model: setattr(model.config, "output_hidden_states", True),
    "attentions": lambda model: setattr(model.config, "output_attentions", True),
    "eager attention": lambda model: model.set_attn_implementation("eager"),
    "zeros": lambda model: [weight.data.zero_() for weight in model.parameters()],
    "large weights": lambda model: [weight.data.mul_(1e6) for weight in model.parameters()],
    "NaN": lambda model: next(model.parameters()).data[..., :1].fill_(torch.nan),
    "tied projections": tie,
    "no pad token": lambda model: setattr(model.config, "pad_token_id", None),
    "other labels": lambda model: setattr(model.config, "num_labels", 5),
    "regression": lambda model: setattr(model.config, "problem_type", "regression"),
    "a closure": lambda model: setattr(model, "forward", lambda *_, **__: None),
    "compiled": lambda model: setattr(model, "forward", torch.no_grad()(model.forward)),
    "contiguous views": lambda model: [
        setattr(weight, "data", weight.data.t().contiguous().t())
        for weight in model.parameters()
        if weight.dim() == 2
    ],
}

Batch = dict[str, Any]


def each(change: Callable[[Tensor], Tensor]) -> Callable[[Batch, Tensor], Any]:
    """Change every entry with rows and columns."""
    return lambda batch, _: batch.update(
        {
            name: change(value)
            for name, value in batch.items()
            if isinstance(value, Tensor) and value.dim() > 1
        }
    )


ENTRIES: dict[str, Callable[[Batch, Tensor], Any]] = {
    "labels": lambda batch, rows: batch.update(labels=torch.zeros(len(rows), dtype=torch.long)),
    "large labels": lambda batch, rows: batch.update(labels=torch.full((len(rows),), 9)),
    "float labels": lambda batch, rows: batch.update(labels=torch.rand(len(rows))),
    "vector labels": lambda batch, rows: batch.update(labels=torch.rand(len(rows), 2)),
    "token labels": lambda batch, rows: batch.update(labels=rows.flatten(1).long().clamp(0, 1)),
    "answers": lambda batch, rows: batch.update(
        start_positions=torch.zeros(len(rows)).long(), end_positions=torch.ones(len(rows)).long()
    ),
    "far answers": lambda batch, rows: batch.update(
        start_positions=torch.full((len(rows),), 99), end_positions=torch.full((len(rows),), -5)
    ),
    "no mask": lambda batch, rows: batch.pop("attention_mask", None),
    "empty mask": lambda batch, rows: batch.update(
        attention_mask=torch.zeros(rows.shape[:2], dtype=torch.long)
    ),
    "one empty row": lambda batch, rows: batch.update(
        attention_mask=(torch.arange(len(rows))[:, None] > 0).long().expand(rows.shape[:2])
    ),
    "boolean mask": lambda batch, rows: batch.update(
        attention_mask=torch.ones(rows.shape[:2], dtype=torch.bool)
    ),
    "float mask": lambda batch, rows: batch.update(attention_mask=torch.ones(rows.shape[:2])),
    "square mask": lambda batch, rows: batch.update(
        attention_mask=torch.ones(len(rows), 1, rows.shape[1], rows.shape[1])
    ),
    "token types": lambda batch, rows: batch.update(token_type_ids=torch.zeros_like(rows)),
    "bad token types": lambda batch, rows: batch.update(token_type_ids=torch.ones_like(rows) * 7),
    "positions": lambda batch, rows: batch.update(position_ids=torch.arange(rows.shape[1])[None]),
    "bad positions": lambda batch, rows: batch.update(
        position_ids=torch.full((len(rows), rows.shape[1]), 10**6)
    ),
    "an unknown entry": lambda batch, rows: batch.update(weight=torch.ones(len(rows))),
    "a number": lambda batch, rows: batch.update(idx=torch.tensor(3)),
    "a list": lambda batch, rows: batch.update(text=["x"] * len(rows)),
    "nothing": lambda batch, rows: batch.update(token_type_ids=None),
    "int32": each(lambda value: value.int()),
    "float16": each(lambda value: value.half()),
    "no rows": each(lambda value: value[:0]),
    "one row": each(lambda value: value[:1]),
    "one token": each(lambda value: value[:, :1]),
    "choices": each(lambda value: value[:, None]),
    "a decoder's": lambda batch, rows: batch.update(decoder_input_ids=rows.clone()),
    "a bad decoder's": lambda batch, rows: batch.update(decoder_input_ids=rows + 10**5),
    "masks of a decoder": lambda batch, rows: batch.update(decoder_attention_mask=torch.ones(2, 2)),
    "gradients": lambda batch, rows: batch.update(
        inputs_embeds=torch.ones(*rows.shape[:2], 16, requires_grad=True)
    ),
    "return_dict": lambda batch, rows: batch.update(return_dict=False),
    "use_cache": lambda batch, rows: batch.update(use_cache=torch.ones(len(rows))),
}

CONTEXTS: list[Callable[[], Any]] = [
    contextlib.nullcontext,
    torch.no_grad,
    torch.inference_mode,
    lambda: torch.autocast("cpu", dtype=torch.bfloat16),
]


@st.composite
def choices(draw: st.DrawFn) -> Settings:
    """Settings that are allowed together."""
    method = draw(st.sampled_from(METHODS))
    given: dict[str, Any] = {
        "use_labels": draw(st.integers(0, 3)) == 0,
        "tune": draw(st.booleans()),
        "rearrange": draw(st.booleans()),
        "uniform": draw(st.sampled_from([False, False, True])),
        "rounds": draw(st.integers(1, 2)),
        "round_to": draw(st.sampled_from([None, 8])),
    }
    if method == "importance":
        given["importance"] = draw(st.sampled_from(CRITERIA))
    try:
        return Settings(method=method, **given)
    except UserError:
        return Settings(method=method)


def weights(model: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@settings(max_examples=80, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    family=st.sampled_from(FAMILIES),
    states=st.lists(st.sampled_from(sorted(STATES)), max_size=2, unique=True),
    entries=st.lists(st.sampled_from(sorted(ENTRIES)), max_size=2, unique=True),
    everywhere=st.booleans(),
    chosen=choices(),
    metric=st.sampled_from([*4 * ["mac"], "params", "memory"]),
    ratio=st.sampled_from([0.001, *3 * [0.4, 0.6, 0.95]]),
    context=st.sampled_from(CONTEXTS),
)
def test_a_result_or_one_sentence(
    family: tuple[str, Any],
    states: list[str],
    entries: list[str],
    everywhere: bool,
    chosen: Settings,
    metric: str,
    ratio: float,
    context: Callable[[], Any],
) -> None:
    model = make_tiny_model(*family)
    batches = [make_tiny_batch(4, seed=seed, model_type=family[0]) for seed in range(3)]
    for batch in batches if everywhere else batches[1:2]:
        rows = batch["input_ids" if "input_ids" in batch else "pixel_values"]
        for entry in entries:
            ENTRIES[entry](batch, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for state in states:
            with contextlib.suppress(ValueError):  # a family without it
                STATES[state](model)
        before, modes = weights(model), [module.training for module in model.modules()]
        try:
            with context():
                result = prune(model, batches, Constraint(metric, ratio), chosen)
            assert result.achieved[metric] <= ratio
        except UserError as error:
            text = str(error)
            assert text.isprintable()
            assert len(text) < 600
    for one, other in zip(weights(model), before, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert [module.training for module in model.modules()] == modes
