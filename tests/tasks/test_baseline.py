"""A score below what needs no model is noticed, for every kind of task.

Without this a wrong label order, column or checkpoint passes for a model that lost nothing.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rfprune.main import main
from rfprune.tasks.baseline import below_baseline
from rfprune.tasks.evaluation import Evaluation, EvaluationSet
from rfprune.tasks.evaluation_set import Questions
from rfprune.tasks.own_data import custom_task, language_task, similarity_task
from rfprune.tasks.registry import Kind, Task, get_task
from tests.conftest import write_parquet


def found(task: Task, labels: Any, logits: Any, score: float = 50.0, **scores: float) -> str | None:
    values = np.array(logits, dtype=np.float32)
    evaluation = Evaluation(
        score, task.metric_name, {task.metric_name: score, **scores}, (values,), 4, 0.0, task.kind
    )
    data = EvaluationSet(task, [], (), {"validation": len(labels)}, labels=np.array(labels))
    return below_baseline(data, evaluation, None)


def custom(kind: Kind = "classification", problem: str | None = None, names: int = 2) -> Task:
    labels = SimpleNamespace(id2label={i: f"name {i}" for i in range(names)})
    return custom_task(labels, problem, "model", kind)


A, B = [1.0, 0.0], [0.0, 1.0]  # logits of the first and of the second class


@pytest.mark.parametrize("kind", ["classification", "image-classification", "multiple-choice"])
def test_classes_are_compared_with_the_most_frequent_one(kind: Kind) -> None:
    task = custom(kind)
    reason = found(task, [1, 1, 1, 0], [A, A, B, B])
    assert reason is not None
    assert "25.00 is below the 75.00" in reason
    for cause in ("orders (id2label", "--label-column", "--model"):
        assert cause in reason
    assert ("'name 1'" in reason) == (kind != "multiple-choice")
    assert found(task, [1, 1, 1, 0], [B, B, B, B]) is None, "as good as always the same"
    assert found(task, [1, 1, 1, 1], [A, B, B, B]) is None, "one label alone is no baseline"


def test_words_are_compared_with_the_most_frequent_tag() -> None:
    task = custom("token-classification")
    assert "75.00" in str(found(task, [1, 1, 1, 0], [A, A, B, B]))
    assert found(task, [1, 1, 1, 0], [B, B, B, A]) is None


def test_no_entity_found_is_chance() -> None:
    labels = SimpleNamespace(id2label={0: "O", 1: "B-PER"})
    task = custom_task(labels, None, "model", "token-classification")
    assert "f1 of 0.00" in str(found(task, [0, 0, 1], [A, A, A], 0.0))


def test_several_labels_are_compared_with_the_best_fixed_set() -> None:
    task = custom(problem="multi_label_classification", names=3)
    labels = [[1, 0, 0], [1, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert "below the 66.67 of always predicting 'name 0'" in str(
        found(task, labels, np.zeros((4, 3)), 60.0)
    )
    assert found(task, labels, np.zeros((4, 3)), 70.0) is None


@pytest.mark.parametrize("task", [custom(problem="regression", names=1), similarity_task()])
def test_numbers_need_a_correlation(task: Task) -> None:
    labels, logits = np.arange(400) % 5, np.ones((800, 1))
    for score in (-80.0, 0.0, 9.0):
        reason = found(task, labels, logits, score)
        assert reason is not None
        assert "distances" in reason
        assert "up to 10.00 with 400" in reason
    assert found(task, labels, logits, 11.0) is None
    assert found(task, labels[:4], logits, 21.0) is None
    assert found(task, np.ones(4), logits, 0.0) is None


def test_cola_needs_a_correlation() -> None:
    cola = get_task("cola")
    assert "no better than chance" in str(found(cola, [1, 1, 1, 0], [A, A, A, B], -50.0))
    assert found(cola, [1, 1, 1, 1, 0, 0], [A, A, A, B, A, A], 1.0) is None


@pytest.mark.parametrize(("name", "chance"), [("squad", "40.00"), ("squad_v2", "50.00")])
def test_questions_are_compared_with_fixed_answers(name: str, chance: str) -> None:
    task = get_task(name)
    answers: tuple[tuple[str, ...], ...] = (("one",), () if name == "squad_v2" else ("one",))
    questions = Questions(("one two three four",) * 2, answers, None)  # type: ignore[arg-type]
    data = EvaluationSet(task, [], (), {"validation": 2}, questions=questions)

    def reason(score: float) -> str | None:
        scores = {"f1": score} | ({"HasAns_f1": score} if name == "squad_v2" else {})
        made = Evaluation(score, "f1", scores, (), 2, 0.0, task.kind)
        return below_baseline(data, made, None)

    assert f"below the {chance}" in str(reason(30.0))
    assert reason(60.0) is None


def test_a_language_model_is_compared_with_equal_probabilities() -> None:
    task = language_task()
    data = EvaluationSet(task, [], (), {"validation": 2})
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=100))
    for score, expected in ((101.0, True), (99.0, False)):
        made = Evaluation(score, "perplexity", {"perplexity": score}, (), 2, 0.0, task.kind)
        assert (below_baseline(data, made, model) is not None) == expected


@pytest.mark.parametrize("flags", ["--constraint 0.5", "--max-drop 1"])
def test_the_command_warns_and_builds_no_search_on_it(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pandas as pd

    from rfprune.demo import demo_data_dir
    from rfprune.report.report_json import read_report

    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", ())
    monkeypatch.setattr("rfprune.pruning.collect_statistics", _refuse(flags))
    for path in demo_data_dir().rglob("*.parquet"):
        rows = pd.read_parquet(path)
        rows = rows.assign(label=1 - rows.label, text=rows.pop("sentence")).head(200)
        write_parquet(tmp_path / f"{path.stem}.parquet", rows[["text", "label"]].to_dict("records"))
    given = f"--model demo --task custom --data-dir {tmp_path} --samples 64 --no-cache {flags}"
    code = main([*given.split(), "--output-dir", str(tmp_path / "out")])
    shown = capsys.readouterr()
    if "max-drop" in flags:
        assert code == 2
        assert "--max-drop 1 needs an original that works, but its accuracy of" in shown.err
        assert not (tmp_path / "out").exists()
        return
    assert code == 0
    warnings = read_report(tmp_path / "out")["warnings"]
    assert ["original's accuracy" in one for one in warnings].count(True) == 1, warnings
    pages = [(tmp_path / "out" / name).read_text() for name in ("report.html", "README.md")]
    for text in (" ".join(shown.out.split()), shown.err, *pages):
        assert "of always predicting" in text


def _refuse(flags: str) -> Any:
    from rfprune.methods.statistics import collect_statistics

    def refuse(_: Any) -> Any:
        raise AssertionError("the original is checked before it is pruned")

    return refuse if "max-drop" in flags else collect_statistics
