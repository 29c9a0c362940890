"""Our metrics in Hugging Face evaluate: `load`, `combine`, `evaluator`, and the scores of a run.

Without these a reported score could differ from the metric that users load to check it.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from rfprune.tasks import metrics
from rfprune.tasks.evaluation import evaluate_model
from rfprune.tasks.evaluation_set import prepare_evaluation
from rfprune.tasks.own_data import custom_task, with_columns
from rfprune.tasks.registry import TASKS, get_task
from rfprune.tasks.splits import load_split
from tests.conftest import make_tiny_model, make_tiny_tokenizer

SQUAD = {"id": "q1", "answers": {"text": ["Denver Broncos", "broncos"], "answer_start": [0, 7]}}
ANSWER = {"id": "q1", "prediction_text": "the Broncos"}
BITS = {"predictions": [0, 1, 1, 0, 1], "references": [0, 1, 0, 1, 1]}
VALUES = {"predictions": [0.5, 1.5, 3.25, 2.0], "references": [0.0, 2.5, 2.0, 3.0]}
LABELS = {"predictions": [[1, 0, 1], [0, 0, 1]], "references": [[1, 1, 0], [0, 0, 1]]}
TAGS = {"predictions": [["B-PER", "O"], ["O"]], "references": [["B-PER", "I-PER"], ["O"]]}
TEXTS = {
    "predictions": ["the cat sat on the mat", "no"], "references": ["the cat sat on a mat", "no"],
}  # fmt: skip
PRECISIONS = (6 / 7, 3 / 5, 2 / 4, 1 / 3)
"""Of runs of one to four words; BLEU is their geometric mean, since the lengths are equal."""
SUMMARIES = {"predictions": ["the cat sat", "no"], "references": ["the cat ran", "no"]}
SQUAD_V2 = {"predictions": [ANSWER | {"no_answer_probability": 0.5}], "references": [SQUAD]}

CASES: list[tuple[str, str | None, dict[str, Any], dict[str, float]]] = [
    ("glue", "mrpc", BITS, {"accuracy": 0.6, "f1": 2 / 3}),
    ("glue", "cola", BITS, {"matthews_correlation": 1 / 6}),
    ("glue", "mnli_mismatched", BITS, {"accuracy": 0.6}),
    ("glue", "stsb", VALUES, {"pearson": 0.588902, "spearmanr": 0.4}),
    ("classification", None, BITS, {"accuracy": 0.6, "f1_macro": (2 / 3 + 0.5) / 2}),
    ("classification", "accuracy", BITS, {"accuracy": 0.6}),
    ("correlation", None, VALUES, {"pearson": 0.588902, "spearmanr": 0.4}),
    ("multi_label", None, LABELS, {"f1_micro": 2 / 3, "f1_labels": (1 + 0 + 2 / 3) / 3}),
    ("token_classification", None, TAGS,
     {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 2 / 3}),
    ("token_classification", "accuracy", TAGS, {"accuracy": 2 / 3}),
    ("perplexity", None, {"predictions": [[-1.0, -2.0], [-3.0, -2.0]]}, {"perplexity": np.e**2}),
    ("translation", None, TEXTS,
     {"chrf": 72.442047, "bleu": 100 * float(np.prod(PRECISIONS)) ** 0.25}),
    ("rouge", None, SUMMARIES,
     {"rouge1": (2 / 3 + 1) / 2, "rouge2": 1 / 4, "rougeL": (2 / 3 + 1) / 2}),
    ("squad", None, {"predictions": [ANSWER], "references": [SQUAD]},
     {"exact_match": 100.0, "f1": 100.0}),
    ("squad_v2", None, SQUAD_V2, {"exact": 100.0, "f1": 100.0, "total": 1, "HasAns_exact": 100.0,
     "HasAns_f1": 100.0, "HasAns_total": 1, "best_exact": 100.0, "best_exact_thresh": 0.5,
     "best_f1": 100.0, "best_f1_thresh": 0.5}),
]  # fmt: skip


INPUTS = {name: inputs for name, config_name, inputs, _ in CASES if config_name != "stsb"}


@pytest.fixture(autouse=True, scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The only folder in which `evaluate` can write during these tests."""
    folder = tmp_path_factory.mktemp("caches")
    evaluate = import_evaluate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder / "modules")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "metrics")
        # evaluate appends its folder: one that an earlier test has used would come first
        patch.setattr(sys, "path", [str(folder / "modules"), *sys.path])
        for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
            patch.delitem(sys.modules, name)
        yield folder


def import_evaluate() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports use deprecated names
        import evaluate
        import evaluate.evaluator
    return evaluate


def load_by_path(name: str, config_name: str | None) -> Any:
    path = str(metrics.metric_module(name))
    return import_evaluate().load(path, config_name, keep_in_memory=True)


@pytest.mark.parametrize(("name", "config_name", "inputs", "expected"), CASES)
def test_loaded_by_path_and_made_in_memory_they_score_alike(
    name: str, config_name: str | None, inputs: dict[str, Any], expected: dict[str, float],
    caches: Path,
) -> None:  # fmt: skip
    before = sorted(caches.rglob("*"))
    made = metrics.load_metric(name, config_name).compute(**inputs)
    assert sorted(caches.rglob("*")) == before
    assert made == pytest.approx(expected, rel=1e-5)
    assert list(made) == list(expected)
    assert load_by_path(name, config_name).compute(**inputs) == made


def test_every_module_has_a_case() -> None:
    folder = metrics.metric_module("glue").parent
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {name for name, *_ in CASES} == names


def test_every_task_has_its_main_score() -> None:
    for task in TASKS.values():
        name, config_name = metrics.metric_of_task(task)
        inputs = next(
            case[2] for case in CASES if case[0] == name and case[1] in (config_name, "mrpc")
        )
        inputs = VALUES if task.kind == "regression" else inputs
        assert task.metric_name in metrics.load_metric(name, config_name).compute(**inputs)


def test_they_combine() -> None:
    both = import_evaluate().combine(
        [metrics.load_metric("glue", "mrpc"), load_by_path("classification", "accuracy")]
    )
    found = both.compute(**BITS)
    expected = {"glue_accuracy": 0.6, "f1": 2 / 3, "classification_accuracy": 0.6}
    assert found == pytest.approx(expected)


def evaluate_folder(
    task: str, model: Any, folder: Path, data: Any, metric: Any, **more: Any
) -> Any:
    """Scores by `evaluate.evaluator`, which takes a folder (it knows no model objects of
    transformers 5)."""
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return import_evaluate().evaluator(task).compute(
        model_or_pipeline=str(folder), data=data, metric=metric, device=-1, **more
    )  # fmt: skip


@pytest.mark.parametrize(("name", "config_name"), [("glue", "mrpc"), ("classification", None)])
def test_the_evaluator_of_text_classification_agrees_with_ours(
    name: str, config_name: str | None, tiny_data_dir: Path, tmp_path: Path
) -> None:
    task = get_task("sst2")
    model = make_tiny_model("bert", num_labels=2)
    data = load_split(task, "validation", tiny_data_dir)
    found = evaluate_folder(
        "text-classification", model, tmp_path, data, metrics.load_metric(name, config_name),
        input_column="sentence", label_mapping={"LABEL_0": 0, "LABEL_1": 1},
    )  # fmt: skip
    ours = evaluate_model(model, prepare_evaluation(task, make_tiny_tokenizer(), tiny_data_dir))
    assert 100 * found["accuracy"] == pytest.approx(ours.score)
    assert 0 < found["accuracy"] < 1


def test_the_evaluator_of_tokens_agrees_with_ours(tmp_path: Path) -> None:
    names = ["O", "B-PER", "I-PER"]
    config = make_tiny_model("bert", num_labels=3).config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForTokenClassification(config).eval()
    rows = {
        "tokens": [["the", "film"], ["a", "good", "plot"], ["zebra", "was"]],
        "ner_tags": [[0, 1], [0, 1, 2], [1, 0]],
    }
    tags = Sequence(ClassLabel(names=names))
    features = Features({"tokens": Sequence(Value("string")), "ner_tags": tags})
    found = evaluate_folder(
        "token-classification", model, tmp_path / "model", Dataset.from_dict(rows, features),
        metrics.load_metric("token_classification"),
    )  # fmt: skip
    for split in ("train", "validation"):
        Dataset.from_dict(rows).to_json(tmp_path / f"{split}.jsonl")
    task = custom_task(config, None, "here", "token-classification")
    task = with_columns(task, tmp_path, None, None)
    ours = evaluate_model(model, prepare_evaluation(task, make_tiny_tokenizer(), tmp_path))
    assert set(ours.scores) == {"f1", "precision", "recall", "accuracy"}
    assert {name: 100 * found[name] for name in ours.scores} == pytest.approx(ours.scores)
    assert 0 < found["accuracy"] < 1


def test_squad_modules_match_by_id_not_by_order() -> None:
    second = {"id": "q2", "answers": {"text": ["gold"], "answer_start": [3]}}
    answers = {"q1": "broncos", "q2": "gold"}
    for order in itertools.permutations(answers):
        predictions = [{"id": name, "prediction_text": answers[name]} for name in order]
        scores = metrics.load_metric("squad").compute(
            predictions=predictions, references=[SQUAD, second]
        )
        assert scores["exact_match"] == 100.0
    unsure = [{"id": "q1", "prediction_text": "", "no_answer_probability": 0.0}] * 2
    with pytest.raises(ValueError, match="no prediction for 1 questions, as q2"):
        metrics.load_metric("squad_v2").compute(predictions=unsure, references=[SQUAD, second])
    threshold = metrics.load_metric("squad_v2").compute(**SQUAD_V2, no_answer_threshold=0.4)
    assert threshold["exact"] == 0.0


def test_an_unknown_glue_task_is_refused() -> None:
    with pytest.raises(KeyError, match="wnli"):
        metrics.load_metric("glue", "glue")


def test_values_keep_their_precision() -> None:
    """In float32 these values are equal, and their correlation with the labels is undefined."""
    close = [1.0, 1.0 + 1e-9, 1.0 + 2e-9]
    scores = metrics.compute_scores(get_task("stsb"), np.array(close), np.array([1.0, 2.0, 3.0]))
    assert scores["spearmanr"] == pytest.approx(100.0)


def test_importing_the_metrics_leaves_evaluate_alone() -> None:
    loaded = "sys.exit(bool({'evaluate', 'datasets', 'torch'} & {*sys.modules}))"
    code = f"import rfprune.tasks.metrics, sys; {loaded}"
    root = Path(__file__).parents[2]
    finished = subprocess.run([sys.executable, "-c", code], cwd=root, check=False)
    assert finished.returncode == 0


@pytest.mark.network
@pytest.mark.parametrize("name", sorted(metrics.GLUE_SCORES))
def test_glue_equals_the_hub(name: str) -> None:
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(0, 2, (2, 50)).tolist()
    if name == "stsb":
        truth, predicted = (5 * generator.random((2, 50))).round(2).tolist()
    arguments = {"predictions": predicted, "references": truth}
    official = import_evaluate().load("glue", name).compute(**arguments)
    assert official == pytest.approx(
        metrics.load_metric("glue", name).compute(**arguments), abs=1e-6
    )


@pytest.mark.network
@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_squad_equals_the_hub(name: str) -> None:
    texts = ["the broncos", "Denver", "gold", "a", ""]
    references = [SQUAD | {"id": f"q{row}"} for row in range(len(texts))]
    predictions = [{"id": f"q{row}", "prediction_text": text} for row, text in enumerate(texts)]
    if name == "squad_v2":
        references[2] = references[2] | {"answers": {"text": [], "answer_start": []}}
        for row, prediction in enumerate(predictions):
            prediction["no_answer_probability"] = row / 5  # type: ignore[assignment]
    arguments = {"predictions": predictions, "references": references}
    official = import_evaluate().load(name).compute(**arguments)
    assert official == pytest.approx(metrics.load_metric(name).compute(**arguments))
