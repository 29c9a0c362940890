"""Scores and logits of a model against those computed row by row.

Without these a row's logits could land at another row, padding could leak into a score, or an
evaluation could change the model, all without a sign in the numbers.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor, nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

from rfprune.errors import UserError
from rfprune.tasks.encoding import encode
from rfprune.tasks.evaluation import (
    Evaluation,
    EvaluationSet,
    divergence,
    evaluate_model,
    prepare_evaluation,
)
from rfprune.tasks.metrics import GLUE_SCORES, score_labels
from rfprune.tasks.registry import get_task
from rfprune.tasks.splits import load_split
from tests.conftest import MODEL_TYPES

TinyModel = Callable[..., Any]
TinyTokenizer = Callable[..., Any]


class OfTokens(nn.Module):
    """Outputs that are plain functions of the token ids, whatever stands around them."""

    def __init__(self, kind: str, num_labels: int = 2, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(scale))
        self.kind, self.num_labels = kind, num_labels
        self.seen: list[tuple[str, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        assert not torch.is_grad_enabled()
        assert not self.training
        values = torch.sin(input_ids.double() * self.weight.double())
        if self.kind == "question-answering":
            return QuestionAnsweringModelOutput(
                start_logits=values.float(),
                end_logits=torch.cos(3 * input_ids.double()).float(),
            )
        means = (values * attention_mask).sum(1, keepdim=True) / attention_mask.sum(1, keepdim=True)
        logits = torch.cat([torch.sin(50 * (k + 1) * means) for k in range(self.num_labels)], 1)
        return SequenceClassifierOutput(logits=logits.float())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_are_each_rows_own_in_dataset_order(
    model_type: str,
    tiny_model: TinyModel,
    tiny_tokenizer: TinyTokenizer,
    tiny_data_dir: Path,
) -> None:
    # The richest tokenizer: models that know no token types must do without them.
    task, tokenizer, model = get_task("mrpc"), tiny_tokenizer("bert"), tiny_model(model_type)
    evaluation_set = prepare_evaluation(task, tokenizer, tiny_data_dir, batch_size=5)
    encoded = encode(task, tokenizer, load_split(task, "validation", tiny_data_dir))
    one_token_type = getattr(model.config, "type_vocab_size", None) == 1
    names = ["input_ids", "attention_mask"]
    if model_type in ("bert", "electra"):
        names.append("token_type_ids")
    for batch in evaluation_set.batches:
        assert batch["token_type_ids"].any()
        if one_token_type:
            batch["token_type_ids"].zero_()
    logits = evaluate_model(model, evaluation_set).logits[0]
    assert logits.shape == (24, 2)
    assert np.ptp(logits[:, 0]) > 0.1
    for row in range(24):
        inputs = {name: torch.tensor([encoded[row][name]]) for name in names}
        with torch.no_grad():
            expected = model(**inputs).logits[0].numpy()
        np.testing.assert_allclose(logits[row], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["mrpc", "sst2", "stsb"])
def test_scores_are_the_tasks_in_points(
    name: str, tiny_tokenizer: TinyTokenizer, tiny_data_dir: Path
) -> None:
    task = get_task(name)
    model = OfTokens(task.kind, task.num_labels)
    found = evaluate_model(model, prepare_evaluation(task, tiny_tokenizer(), tiny_data_dir))
    labels = load_split(task, "validation", tiny_data_dir)["label"]
    logits = found.logits[0]
    predictions = logits[:, 0] if name == "stsb" else logits.argmax(axis=1)
    assert len(np.unique(predictions)) > 1
    expected = score_labels(GLUE_SCORES[name], predictions, labels)
    assert found.scores == pytest.approx({key: 100 * value for key, value in expected.items()})
    assert found.score == found.scores[found.metric_name]
    assert found.metric_name == task.metric_name
    assert found.num_examples == 24
    assert found.seconds > 0


def test_mnli_scores_both_splits(tiny_tokenizer: TinyTokenizer, tiny_data_dir: Path) -> None:
    task, model = get_task("mnli"), OfTokens("classification", 3)
    found = evaluate_model(model, prepare_evaluation(task, tiny_tokenizer(), tiny_data_dir))
    assert found.logits[0].shape == (48, 3)
    assert found.num_examples == 48
    expected = {}
    for first, split, key in (
        (0, "validation_matched", "accuracy"),
        (24, "validation_mismatched", "accuracy_mismatched"),
    ):
        alone = dataclasses.replace(task, validation_splits=(split,))
        single = evaluate_model(model, prepare_evaluation(alone, tiny_tokenizer(), tiny_data_dir))
        np.testing.assert_array_equal(single.logits[0], found.logits[0][first : first + 24])
        expected[key] = single.score
    assert found.scores == expected
    assert found.score == expected["accuracy"] != expected["accuracy_mismatched"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_span_logits_do_not_depend_on_padding(
    name: str, side: str, tiny_tokenizer: TinyTokenizer, tiny_data_dir: Path
) -> None:
    task = dataclasses.replace(get_task(name), max_length=60, stride=10)
    tokenizer = tiny_tokenizer("distilbert")
    tokenizer.padding_side = side
    evaluation_set = prepare_evaluation(task, tokenizer, tiny_data_dir, batch_size=4)
    padded = [batch for batch in evaluation_set.batches if not batch["attention_mask"].all()]
    assert padded
    assert all((batch["attention_mask"][:, 0] == 0).any() == (side == "left") for batch in padded)
    found = evaluate_model(OfTokens(task.kind), evaluation_set)
    encoded = encode(task, tokenizer, load_split(task, "validation", tiny_data_dir))
    start, end = found.logits
    assert start.shape == end.shape == (len(encoded), 60)
    separator = tokenizer.sep_token_id
    for row, tokens in enumerate(encoded["input_ids"]):
        context = np.arange(tokens.index(separator) + 1, len(tokens) - 1)
        wanted = [*([0] if name == "squad_v2" else []), *context]
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(start[row])), wanted)
        values = np.array(tokens, dtype=float)[wanted]
        np.testing.assert_allclose(start[row, wanted], np.sin(values), atol=1e-6)
        np.testing.assert_allclose(end[row, wanted], np.cos(3 * values), atol=1e-6)
    assert (found.num_examples, found.score) == (24, found.scores["f1"])


class SureOfNothing(OfTokens):
    """Says at the CLS token, id 2, that there is no answer, as loudly as `weight`."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        output = super().forward(input_ids, attention_mask)
        loud = self.weight * (input_ids == 2)
        for values in (output.start_logits, output.end_logits):
            values += loud
        return output


def test_squad_v2_answers_or_declines(tiny_tokenizer: TinyTokenizer, tiny_data_dir: Path) -> None:
    task = get_task("squad_v2")
    evaluation_set = prepare_evaluation(task, tiny_tokenizer(), tiny_data_dir)
    declined = evaluate_model(SureOfNothing(task.kind, scale=50.0), evaluation_set).scores
    answered = evaluate_model(SureOfNothing(task.kind, scale=-50.0), evaluation_set).scores
    assert declined["NoAns_f1"] == declined["NoAns_exact"] == 100.0
    assert declined["HasAns_f1"] == answered["NoAns_f1"] == 0.0
    assert declined["f1"] == pytest.approx(100 * 8 / 24)  # every third has no answer
    assert answered["HasAns_f1"] > 0.0
    assert min(declined["best_f1"], answered["best_f1"]) >= declined["f1"]
    assert not any(name.endswith("total") for name in declined)


def test_a_limit_draws_rows_by_seed(tiny_tokenizer: TinyTokenizer, tiny_data_dir: Path) -> None:
    task = get_task("stsb")

    def drawn(limit: int | None, seed: int = 0) -> list[float]:
        evaluation_set = prepare_evaluation(
            task, tiny_tokenizer(), tiny_data_dir, limit=limit, seed=seed
        )
        assert evaluation_set.labels is not None
        rows = np.concatenate(evaluation_set.rows)
        assert sorted(rows) == list(range(evaluation_set.num_examples))
        return [float(label) for label in evaluation_set.labels]

    everything = drawn(None)
    assert drawn(100) == everything
    first = drawn(8)
    assert len(first) == 8
    assert first == drawn(8) != drawn(8, seed=1)
    assert [label for label in everything if label in first] == first
    with pytest.raises(UserError, match="limit of 0"):
        drawn(0)
    with pytest.raises(UserError, match="seed of -1"):
        drawn(8, seed=-1)


def test_limited_questions_keep_their_answers(
    tiny_tokenizer: TinyTokenizer, tiny_data_dir: Path
) -> None:
    task = get_task("squad")
    whole = prepare_evaluation(task, tiny_tokenizer(), tiny_data_dir).questions
    few = prepare_evaluation(task, tiny_tokenizer(), tiny_data_dir, limit=5, seed=3)
    assert whole is not None
    assert few.questions is not None
    pairs = set(zip(whole.contexts, whole.answers, strict=True))
    assert few.num_examples == len(few.questions.contexts) == 5
    assert set(zip(few.questions.contexts, few.questions.answers, strict=True)) < pairs


def test_the_model_comes_back_in_its_modes(
    tiny_model: TinyModel, tiny_tokenizer: TinyTokenizer, tiny_data_dir: Path
) -> None:
    evaluation_set = prepare_evaluation(get_task("mrpc"), tiny_tokenizer(), tiny_data_dir)
    model = tiny_model("bert").train()
    model.bert.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    assert True in modes
    assert False in modes
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    first = evaluate_model(model, evaluation_set)
    assert [module.training for module in model.modules()] == modes
    assert divergence(first, evaluate_model(model.eval(), evaluation_set)) == 0.0  # no dropout
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train()
    handle = model.classifier.register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(model, evaluation_set)
    handle.remove()
    assert all(module.training for module in model.modules())


def _interrupt(module: nn.Module, arguments: Any) -> None:
    raise KeyboardInterrupt


def test_half_precision_is_scored_in_single(
    tiny_model: TinyModel, tiny_tokenizer: TinyTokenizer, tiny_data_dir: Path
) -> None:
    evaluation_set = prepare_evaluation(get_task("mrpc"), tiny_tokenizer(), tiny_data_dir)
    single = evaluate_model(tiny_model("bert"), evaluation_set)
    half = evaluate_model(tiny_model("bert").to(torch.bfloat16), evaluation_set)
    assert half.logits[0].dtype == np.float32
    assert 0.0 < divergence(single, half) < 0.05


# What is wrong with a model


def set_of(
    name: str, tiny_tokenizer: TinyTokenizer, tiny_data_dir: Path, **options: Any
) -> EvaluationSet:
    return prepare_evaluation(get_task(name), tiny_tokenizer(), tiny_data_dir, **options)


@pytest.mark.parametrize("name", ["mrpc", "squad"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_logits_that_are_no_numbers_are_named(
    name: str, value: str, tiny_tokenizer: TinyTokenizer, tiny_data_dir: Path
) -> None:
    model = OfTokens(get_task(name).kind, scale=float(value))
    with pytest.raises(UserError, match=r"not finite .*nan in row 0"):
        evaluate_model(model, set_of(name, tiny_tokenizer, tiny_data_dir))


@pytest.mark.parametrize(
    ("name", "head", "config", "what"),
    [
        ("squad", "sequence-classification", {}, "no start_logits and no end_logits"),
        ("mrpc", "question-answering", {}, "returns no logits"),
        ("mrpc", "none", {}, "returns no logits"),
        ("mnli", "sequence-classification", {}, r"\(32, 2\), but the task needs \(32, 3\)"),
        ("squad", "question-answering", {"max_position_embeddings": 40}, "at most 40 tokens"),
        ("mrpc", "sequence-classification", {"vocab_size": 50}, "only 50 token embeddings"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    name: str,
    head: str,
    config: dict[str, int],
    what: str,
    tiny_model: TinyModel,
    tiny_tokenizer: TinyTokenizer,
    tiny_data_dir: Path,
) -> None:
    with pytest.raises(UserError, match=what):
        evaluate_model(
            tiny_model("bert", head, **config), set_of(name, tiny_tokenizer, tiny_data_dir)
        )


def test_a_wrapped_model_gets_every_input(
    tiny_model: TinyModel, tiny_tokenizer: TinyTokenizer, tiny_data_dir: Path
) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **inputs: Tensor) -> Any:
            assert "token_type_ids" in inputs
            return self.inner(**inputs)

    evaluation_set = set_of("mrpc", tiny_tokenizer, tiny_data_dir)
    model = tiny_model("bert")
    wrapped = evaluate_model(Wrapped(model), evaluation_set)
    assert divergence(evaluate_model(model, evaluation_set), wrapped) == 0.0
    with pytest.raises(UserError, match="Linear takes no input_ids"):
        evaluate_model(nn.Linear(2, 2), evaluation_set)


# Divergence


def evaluation_of(*logits: Any) -> Evaluation:
    arrays = tuple(np.asarray(values, dtype=np.float32) for values in logits)
    return Evaluation(0.0, "accuracy", {"accuracy": 0.0}, arrays, len(arrays[0]), 0.0)


def kl(reference: Any, other: Any) -> float:
    """KL of two vectors of logits, by its definition."""
    p, q = (log_softmax(np.asarray(values, dtype=np.float64)) for values in (reference, other))
    return float(sum(np.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))


def test_divergence_of_classes_is_the_mean_kl_from_the_reference() -> None:
    generator = np.random.default_rng(0)
    first, second = 30 * generator.normal(size=(2, 6, 3)).astype(np.float32)
    expected = np.mean([kl(*rows) for rows in zip(first, second, strict=True)])
    found = divergence(evaluation_of(first), evaluation_of(second))
    assert found == pytest.approx(expected, rel=1e-12)
    assert found != pytest.approx(divergence(evaluation_of(second), evaluation_of(first)), rel=0.01)
    assert divergence(evaluation_of(first), evaluation_of(first)) == 0.0
    shifted = evaluation_of(first + 7.0)
    assert divergence(evaluation_of(first), shifted) == pytest.approx(0.0, abs=1e-9)


def test_divergence_of_a_regression_is_half_the_mean_square() -> None:
    assert divergence(evaluation_of([[1.0], [2.0]]), evaluation_of([[1.0], [5.0]])) == 9 / 4


def test_divergence_of_spans_is_over_what_can_be_an_answer() -> None:
    outside = -np.inf
    first = [[outside, 1.0, 2.0, outside], [0.0, outside, outside, outside], [outside] * 4]
    second = [[outside, 3.0, 2.5, outside], [9.0, outside, outside, outside], [outside] * 4]
    start = kl([1.0, 2.0], [3.0, 2.5]) / 3  # windows with one or no candidate add nothing
    found = divergence(evaluation_of(first, first), evaluation_of(second, first))
    assert found == pytest.approx(start)
    both = divergence(evaluation_of(first, second), evaluation_of(second, first))
    assert both == pytest.approx(start + kl([3.0, 2.5], [1.0, 2.0]) / 3)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([np.zeros((2, 2))], [np.zeros((3, 2))]),
        ([np.zeros((2, 2))], [np.zeros((2, 2))] * 2),
        ([np.array([[0.0, -np.inf]])] * 2, [np.zeros((1, 2))] * 2),
    ],
)
def test_divergence_needs_one_evaluation_set(first: Any, second: Any) -> None:
    with pytest.raises(ValueError, match=r"zip|same evaluation set"):
        divergence(evaluation_of(*first), evaluation_of(*second))


# Real checkpoints


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "expected", "one_row"),
    [("mrpc", 76.5625, 100 / 64), ("sst2", 90.625, 100 / 64), ("stsb", 83.195, 0.5)],
)
def test_real_checkpoints_score_what_they_should(
    name: str, expected: float, one_row: float, shared: Path
) -> None:
    """On 64 rows; rounding on another machine may turn one of them."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = shared / "models" / f"minilm-l6-{name}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    evaluation_set = prepare_evaluation(
        get_task(name), tokenizer, shared / "data", limit=64, max_length=64
    )
    assert evaluate_model(model, evaluation_set).score == pytest.approx(expected, abs=one_row)
