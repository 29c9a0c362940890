"""What a notebook passes to the API by mistake or habit gets one sentence, before any work.

Without these tests a mistake could end in an error from deep inside torch, or after minutes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rfprune.cost.constraint import Constraint
from rfprune.errors import UserError
from rfprune.latency.table import LatencyTable
from rfprune.model.checkpoint import load_masks, load_pruned, save_pruned
from rfprune.pruning import prune, prune_family
from rfprune.settings import Settings
from tests.conftest import make_tiny_batch

Tiny = Callable[..., Any]
Batch = dict[str, Tensor]
HALF = Constraint("mac", 0.5)


@pytest.fixture(autouse=True)
def no_work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks come before the collection."""

    def fail(*_: Any) -> None:
        raise AssertionError("statistics were collected")

    if "_work" not in request.node.name:
        monkeypatch.setattr("rfprune.pruning.collect_statistics", fail)


@pytest.fixture
def batches(tiny_batch: Tiny) -> list[Batch]:
    return [tiny_batch(6, 7 + seed, seed=seed) for seed in range(3)]


def refuses(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400


def changed(**entries: Any) -> Callable[[list[Batch]], Any]:
    """The batches with other entries in the last one; None leaves an entry out."""

    def change(batches: list[Batch]) -> Any:
        values = {**batches[-1], **entries}
        return [*batches[:-1], {key: value for key, value in values.items() if value is not None}]

    return change


IDS = make_tiny_batch(6)["input_ids"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda batches: batches[0], r"batches is a single dict.* give \[batch\]"),
        (lambda _: torch.ones(2, 3), "batches is a single Tensor"),
        (lambda _: None, "batches is a single NoneType"),
        (lambda _: "text", "batches is a single str"),
        (lambda _: [], "nothing to calibrate on.* at least one example"),
        (lambda _: ["text"], r"batches\[0\] is a str.* map names to tensors"),
        (changed(text=["x"] * 6), r"batches\[2\]\['text'\] is a list.*leave it out"),
        (changed(epoch=3), r"batches\[2\]\['epoch'\] is a int"),
        (changed(epoch=torch.tensor(1)), r"batches\[2\]\['epoch'\] is a single number.* leave it"),
        (changed(extra=torch.ones(2)), r"batches\[2\]\['extra'\] has 2 rows, .*'input_ids' has 6"),
        (changed(input_ids=torch.zeros(0, 9).long()), r"batches\[2\].* no example or no token"),
        (changed(input_ids=torch.zeros(6, 0).long()), r"batches\[2\].* no example or no token"),
        (
            changed(input_ids=IDS[0]),
            r"batches\[2\]\['input_ids'\] has shape \(7,\), .* takes 2 dim",
        ),
        (
            changed(input_ids=IDS.float(), attention_mask=None),
            r"batches\[2\]\['input_ids'\] holds torch.float32",
        ),
        (
            changed(input_ids=IDS + 999, attention_mask=None),
            r"'input_ids'\] has the id \d+, .*0 to 218: use the tok",
        ),
        (
            changed(input_ids=IDS - 999, attention_mask=None),
            r"'input_ids'\] has the id -\d+, .*0 to 218: use the tok",
        ),
        (changed(input_ids=IDS[:, None]), r"\['input_ids'\] has shape \(6, 1, 7\), .* takes 2 dim"),
        (changed(use_cache=torch.ones(6)), r"batches\[2\]\['use_cache'\] is an option.*leave"),
        (changed(input_ids=None), r"batches\[2\] holds attention_mask, but .* needs input_ids"),
        (changed(token_type_ids=2 + 0 * IDS), r"'token_type_ids'\] has the id 2, .* 0 to 1"),
        (
            changed(attention_mask=torch.ones(6, 3)),
            r"attention_mask of shape \(6, 3\) does not fit",
        ),
        (
            changed(input_ids=IDS[:, :1].repeat(1, 600), attention_mask=None),
            r"'input_ids'\] has 600 tokens .* at most 514: .*truncation=True, max_length=514",
        ),
        (changed(input_ids=torch.ones(6, 7).to_sparse()), "dense tensor"),
        (
            changed(input_ids=None, inputs_embeds=torch.full((6, 9, 16), torch.nan)),
            r"batches\[2\]\['inputs_embeds'\] holds NaN",
        ),
        (
            changed(input_ids=None, inputs_embeds=torch.ones(6, 9, 5)),
            r"cannot run on batches\[2\] .*give the inputs",
        ),
    ],
)
def test_batches(
    change: Callable[[list[Batch]], Any], says: str, tiny_model: Tiny, batches: list[Batch]
) -> None:
    refuses(lambda: prune(tiny_model(), change(batches), HALF), says)
    refuses(lambda: next(prune_family(tiny_model(), change(batches), [HALF])), says)


@pytest.mark.parametrize(
    ("model_type", "limit"),
    [("bert", 514), ("roberta", 513), ("gpt2", 514), ("opt", 514), ("bart", 514), ("llama", None)],
)
def test_more_tokens_than_positions(model_type: str, limit: int | None, tiny_model: Tiny) -> None:
    model = tiny_model(model_type, max_position_embeddings=514)
    limit = 513 if model_type == "roberta" else limit  # its padding id is 0 here
    ids = torch.full((2, (limit or 2000) + 1), 7)
    ids[:, -1] = 3  # the end of the text, which a BART reads
    says = "nothing" if limit is None else rf"{len(ids[0])} tokens .* at most {limit}:"
    if limit is None:
        with pytest.raises(AssertionError, match="collected"):
            prune(model, [{"input_ids": ids}], HALF)
        return
    refuses(lambda: prune(model, [{"input_ids": ids}], HALF), says)
    with pytest.raises(AssertionError, match="collected"):
        prune(model, [{"input_ids": ids[:, 1:]}], HALF)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"constraint": "0.5"}, "constraint '0.5' is not a fraction"),
        ({"constraint": 50}, "constraint 50 is not a fraction"),
        ({"constraint": None}, "constraint None is not a fraction"),
        ({"constraint": [0.5, 0.3]}, r"constraint \[0.5, 0.3\] is a list.* prune_family"),
        ({"settings": {"method": "kwon"}}, r"settings is a dict; give Settings\("),
        ({"settings": "kwon"}, r"settings is a str; give Settings\("),
        ({"loss": "mse"}, "loss is a str; give a function"),
        ({"latency_table": "table.json"}, r"latency_table is a str; give LatencyTable.load"),
        ({"cache": 5}, "cache 5 is not a path; give a str"),
        ({"cache": "a\0b"}, r"cache 'a\\x00b' is not a path"),
        ({"loss": lambda outputs, _: outputs.loss}, "the loss is None: .*labels of the batch"),
        ({"loss": lambda outputs, _: outputs.logits}, r"the loss has shape \(6, 2\)"),
        ({"loss": lambda outputs, _: 1.0}, "the loss has type float"),
        ({"loss": lambda outputs, _: torch.ones(6)}, "the loss has no gradient"),
        ({"settings": Settings(use_labels=True)}, "the batches hold no labels.*use_labels"),
    ],
)
def test_arguments(
    arguments: dict[str, Any], says: str, tiny_model: Tiny, batches: list[Batch]
) -> None:
    given: dict[str, Any] = {"constraint": HALF, **arguments}
    refuses(lambda: prune(tiny_model(), batches, **given), says)


def test_errors_of_a_loss_are_the_caller_s_own(tiny_model: Tiny, batches: list[Batch]) -> None:
    def divide(outputs: Any, _: Any) -> Any:
        return outputs.logits / (1 // 0)

    with pytest.raises(ZeroDivisionError):
        prune(tiny_model(), batches, HALF, loss=divide)


def test_a_loss_that_ignores_the_last_layers(tiny_model: Tiny, batches: list[Batch]) -> None:
    model = tiny_model()
    model.config.output_hidden_states = True
    loss = lambda outputs, _: outputs.hidden_states[1].sum((1, 2))  # noqa: E731
    refuses(lambda: prune(model, batches, HALF, loss=loss), "does not depend on every layer")


AUDIO = make_tiny_batch(model_type="wav2vec2")


@pytest.mark.parametrize(
    ("model_type", "batch", "says"),
    [
        ("wav2vec2", make_tiny_batch(), "holds input_ids, .* takes input_values"),
        ("vit", AUDIO, "holds input_values, .* takes pixel_values"),
        ("bert", AUDIO, r"cannot run on batches\[0\]"),
        ("wav2vec2", AUDIO | {"attention_mask": torch.ones(4, 7)}, "one number per sample"),
        ("wav2vec2", {"input_values": torch.ones(4, 1, 56)}, "takes 2 dimensions"),
        ("wav2vec2", {"input_values": torch.ones(4, 3)}, r"cannot run on batches\[0\]"),
    ],
)
def test_audio_and_images(model_type: str, batch: Batch, says: str, tiny_model: Tiny) -> None:
    refuses(lambda: prune(tiny_model(model_type), [batch], HALF), says)


@pytest.mark.parametrize(
    ("model_type", "head", "labels", "says"),
    [
        ("bert", "sequence-classification", 7, r"'labels'\] has the label 7, .* classes 0 to 1"),
        ("bert", "sequence-classification", -1, r"'labels'\] has the label -1"),
        ("llama", "causal-lm", IDS, "not supported for language models"),
        ("t5", "seq2seq-lm", IDS + 9999, r"'labels'\] has the label \d+, .* classes 0 to 218"),
        ("bert", "sequence-classification", IDS, "cannot run on batches|label"),
    ],
)
def test_labels(model_type: str, head: str, labels: Any, says: str, tiny_model: Tiny) -> None:
    given = labels if isinstance(labels, Tensor) else torch.full((6,), labels)
    batch = {"input_ids": IDS, "labels": given}
    model = tiny_model(model_type, head)
    refuses(lambda: prune(model, [batch], HALF, Settings(use_labels=True)), says)


def test_constraints_of_a_family(tiny_model: Tiny, batches: list[Batch]) -> None:
    single: list[Any] = [HALF, 0.5, "0.5", None]
    for constraints in single:
        family = prune_family(tiny_model(), batches, constraints)
        refuses(partial(next, family), "constraints is a single .* give a list")
    refuses(lambda: next(prune_family(tiny_model(), batches, [0.5, 5])), "constraint 5 is not")


@pytest.mark.parametrize(
    "ratio",
    [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), np.array(0.5)],
    ids=lambda ratio: type(ratio).__name__,
)
def test_a_bare_ratio_of_any_library_works_as_a_constraint_on_macs(
    ratio: Any, tiny_model: Tiny, batches: list[Batch]
) -> None:
    model = tiny_model()
    result = prune(model, batches, ratio)
    (other,) = prune_family(model, batches, [ratio])
    assert result.constraint == other.constraint == HALF
    assert type(result.constraint.ratio) is float


def test_a_cache_in_the_home_works(
    tiny_model: Tiny, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    prune(tiny_model(), batches, HALF, cache="~/cache")
    assert [path.suffix for path in (tmp_path / "home" / "cache").iterdir()] == [".rfprune"]
    assert not Path("~").exists()


def test_position_ids_for_all_examples_work(tiny_model: Tiny) -> None:
    batch = {"input_ids": IDS, "position_ids": torch.arange(7)[None]}
    prune(tiny_model(), [batch], HALF)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda model: model.to("meta"), "is on the meta device and has no value; load"),
        (lambda model: model.to(torch.float8_e4m3fn), r"dtype torch.float8_e4m3fn; load"),
        (lambda model: model.classifier.bias.data.fill_(torch.inf), "holds NaN or infinity"),
    ],
    ids=["meta", "float8", "infinity"],
)
def test_weights(
    change: Callable[[Any], Any], says: str, tiny_model: Tiny, batches: list[Batch]
) -> None:
    model = tiny_model()
    change(model)
    refuses(lambda: prune(model, batches, HALF), says)


def test_a_model_from_inference_mode(tiny_model: Tiny, batches: list[Batch]) -> None:
    with torch.inference_mode():
        model = tiny_model()
    refuses(lambda: prune(model, batches, HALF), r"inference_mode\(\).* load the model outside")


def test_batches_from_inference_mode_work(tiny_model: Tiny) -> None:
    embed = tiny_model().get_input_embeddings()
    with torch.inference_mode():
        batch = {"inputs_embeds": embed(IDS), "attention_mask": torch.ones_like(IDS)}
    prune(tiny_model(), [batch], HALF)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rounds": "2"}, "rounds '2' is not a whole number"),
        ({"rounds": True}, "rounds True is not a whole number"),
        ({"tune": "no"}, "tune 'no' is not True or False"),
        ({"use_labels": None}, "use_labels None is not True or False"),
        ({"method": None}, "method None is not a text: choose one of curvature, kwon"),
        ({"method": "Kwon"}, "method 'Kwon' is unknown: choose one of curvature, kwon"),
        ({"depth": True}, "depth True is not off, layers, joint, or how many layers"),
        ({"seed": 1.5}, "seed 1.5 is not a whole number"),
        ({"round_to": "8"}, "round_to '8' is not a whole number: choose one of 1, 8"),
    ],
)
def test_settings(values: dict[str, Any], says: str) -> None:
    refuses(lambda: Settings(**values), says)
    seed: Any = np.int64(3)
    assert Settings(depth=seed).depth == "3"
    assert type(Settings(seed=seed).seed) is int


def test_folders_and_files(
    tiny_model: Tiny, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    result = prune(tiny_model(), batches, HALF, Settings(tune=False))
    bad: Any
    read: Any
    for bad in (None, 5, ["out"]):
        for read in (result.save, load_pruned, load_masks, LatencyTable.load):
            refuses(partial(read, bad), rf"{re.escape(repr(bad))} is not a path")
    refuses(lambda: LatencyTable.load("table.json"), "'table.json' cannot be read")
    refuses(lambda: result.save("out", "bert-base"), "tokenizer is a str.* loaded tokenizer")
    bad = "float16"
    refuses(lambda: result.save("out", dtype=bad), "dtype 'float16' cannot .* torch.float16")
    refuses(lambda: result.save("out", dtype=torch.int8), "dtype torch.int8 cannot store weights")
    fewer = result.masks[1:]
    refuses(lambda: save_pruned(result.model, result.layout, fewer, "out"), "masks do not fit")
    assert list(tmp_path.iterdir()) == []
