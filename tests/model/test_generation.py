"""Pruned decoders generate with a key-value cache, also when layers have lost their attention.

Without these tests a pruned decoder could lose count of the tokens in its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rfprune.model.checkpoint import load_pruned
from rfprune.model.compact import compact
from rfprune.model.dense import to_dense
from rfprune.model.layout import layout_of
from rfprune.model.masks import masked
from tests.conftest import CAUSAL_TYPES
from tests.model.emptied import emptied

Tiny = Callable[..., Any]
Names = tuple[str, ...]

ENCODER_DECODERS = ("bart", "t5", "m2m_100", "marian")
EMPTY_IN_DECODERS: tuple[Names, ...] = (
    (),
    ("layer.0.heads",),
    ("layer.1.heads", "layer.0.neurons"),
    ("layer.0.heads", "layer.1.heads"),
)
EMPTY_IN_ENCODER_DECODERS: tuple[Names, ...] = (
    (),
    ("layer.2.heads",),
    ("layer.2.cross_heads", "layer.3.heads"),
    ("layer.2.heads", "layer.3.heads", "layer.0.heads"),
    ("layer.2.cross_heads", "layer.3.cross_heads"),
)
CASES = [
    *((model_type, empty) for model_type in CAUSAL_TYPES for empty in EMPTY_IN_DECODERS),
    *((one, empty) for one in ENCODER_DECODERS for empty in EMPTY_IN_ENCODER_DECODERS),
]
SETTINGS = {"max_new_tokens": 7, "do_sample": False, "disable_compile": True}
every_case = pytest.mark.parametrize(
    ("model_type", "empty"),
    CASES,
    ids=lambda value: value if type(value) is str else "+".join(value),
)


@pytest.fixture
def model(model_type: str, tiny_model: Tiny) -> Any:
    head = "seq2seq-lm" if model_type in ENCODER_DECODERS else "causal-lm"
    made = tiny_model(model_type, head)
    made.generation_config.eos_token_id = None  # always generate the number of tokens asked for
    if head == "causal-lm":
        made.generation_config.pad_token_id = 0
    return made


@every_case
def test_token_by_token_gives_the_logits_of_one_pass(
    model_type: str, model: Any, empty: Names, tiny_batch: Tiny
) -> None:
    """On more tokens than a window of four reaches, where a family has one."""
    name, batch = "input_ids", {}
    if model_type in ENCODER_DECODERS:
        name, batch = "decoder_input_ids", tiny_batch(2, 6, model_type="bart")
    ids = tiny_batch(2, 12, padding="none", seed=1)["input_ids"]
    small = compact(model, layout_of(model), emptied(layout_of(model), *empty))
    with torch.no_grad():
        full = small(**batch, **{name: ids}).logits
        steps: list[Tensor] = []
        cache: Any = None
        for at in (slice(0, 5), *(slice(i, i + 1) for i in range(5, 12))):
            step = {name: ids[:, at], "past_key_values": cache, "use_cache": True}
            outputs = small(**batch, **step)
            cache = outputs.past_key_values
            steps.append(outputs.logits)
        without_past = small(**batch, **{name: ids[:, 11:]}).logits
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-4)
    first = 2 if model_type in ENCODER_DECODERS else 0
    if not {f"layer.{first}.heads", f"layer.{first + 1}.heads"} <= set(empty):
        assert (without_past[:, -1] - full[:, -1]).abs().max() > 1e-3, "the cache matters"


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@every_case
def test_generated_tokens_are_those_of_the_masked_model(
    model_type: str, model: Any, empty: Names, how: dict[str, Any], tiny_batch: Tiny
) -> None:
    """With prompts of different lengths, padded on the left for decoders."""
    kind = {"model_type": "bart"} if model_type in ENCODER_DECODERS else {"padding": "left"}
    batch = tiny_batch(3, 6, **kind)
    layout = layout_of(model)
    masks = emptied(layout, *empty)
    small = compact(model, layout, masks)
    assert small.can_generate()
    with masked(model, layout, masks):
        expected = model.generate(**batch, **SETTINGS, **how)
    found = small.generate(**batch, **SETTINGS, **how)
    assert found.shape == (3, 8 if model_type in ENCODER_DECODERS else 13)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("model_type", [*CAUSAL_TYPES, *ENCODER_DECODERS])
def test_reloaded_and_dense_models_generate_the_same(
    model_type: str, model: Any, tiny_batch: Tiny, tmp_path: Path
) -> None:
    auto: Any = transformers.AutoModelForCausalLM
    batch, empty = tiny_batch(2, 6, padding="left"), ["layer.0.heads"]
    if model_type in ENCODER_DECODERS:
        auto, empty = transformers.AutoModelForSeq2SeqLM, ["layer.2.heads", "layer.3.cross_heads"]
    layout = layout_of(model)
    masks = emptied(layout, *empty)
    small = compact(model, layout, masks)
    small.save_pretrained(tmp_path)
    expected = small.generate(**batch, **SETTINGS)
    reloaded = load_pruned(tmp_path), auto.from_pretrained(tmp_path, trust_remote_code=True)
    for same in (*reloaded, to_dense(small, layout, masks)):
        assert torch.equal(same.generate(**batch, **SETTINGS), expected)
