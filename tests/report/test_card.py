"""The model card says what was measured and how sure that is, in the form that the hub reads.

Deleting this lets a card lose its evaluation results, name a local folder as the base model, or
give away where somebody's files are.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from rfprune.report.card import (
    CARD_FILE,
    UNKNOWN_REPOSITORY,
    name_repository,
    render_card,
    standard_error,
    write_card,
)
from tests.report.conftest import make_encoder_decoder_report

Report = dict[str, Any]
MakeReport = Callable[..., Report]


def metadata(report: Report) -> dict[str, Any]:
    """As the hub's own library reads it back."""
    data: Any = ModelCard(render_card(report)).data
    found: dict[str, Any] = data.to_dict()
    return found


def test_the_hub_reads_base_task_and_results(report: MakeReport) -> None:
    data = metadata(report())
    assert data["base_model"] == "someone/bert-mrpc"
    assert data["pipeline_tag"] == "text-classification"
    assert data["library_name"] == "transformers"
    assert data["datasets"] == ["nyu-mll/glue"]
    assert data["metrics"] == ["accuracy", "f1"]
    assert {"rfprune", "pruned", "custom_code"} <= set(data["tags"])
    (entry,) = data["model-index"]
    assert entry["name"] == "folder-mrpc-pruned-mac-0.5"
    (result,) = entry["results"]
    assert result["dataset"] == {
        "name": "mrpc",
        "type": "nyu-mll/glue",
        "config": "mrpc",
        "split": "validation",
    }
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
        ("accuracy", 0.789),
        ("f1", 0.85),
    ]


def test_question_answering_has_its_own_task_class_and_unit(report: MakeReport) -> None:
    scores = {"exact_match": 60.0, "f1": 70.5, "HasAns_f1": 80.0}
    squad = report(task="squad_v2", metric_name="f1", scores={"original": scores, "pruned": scores})
    data = metadata(squad)
    assert data["pipeline_tag"] == "question-answering"
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["type"] == "rajpurkar/squad_v2"
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values == {"f1": 70.5, "exact_match": 60.0}
    assert "AutoModelForQuestionAnswering" in render_card(squad)


def test_local_data_is_said_to_be_local(report: MakeReport) -> None:
    (result,) = metadata(report(data_dir="data"))["model-index"][0]["results"]
    assert result["dataset"]["name"] == "mrpc (data from a local folder)"


def test_a_folder_is_no_base_model_and_is_not_given_away(
    report: MakeReport, tmp_path: Path
) -> None:
    folder = tmp_path / "secret" / "checkpoint"
    folder.mkdir(parents=True)
    local = report(model=str(folder), source=str(folder))
    assert "base_model" not in metadata(local)
    text = render_card(local)
    assert "The checkpoint `checkpoint`" in text
    assert "secret" not in text


def test_a_task_that_is_not_in_the_table_has_a_card(report: MakeReport) -> None:
    custom = report(task="my-own-task")
    assert "model-index" not in metadata(custom)
    assert "Only my-own-task was measured" in render_card(custom)


def test_people_read_what_was_done(report: MakeReport) -> None:
    text = render_card(report())
    for part in (
        *("| accuracy | 80.39 | 78.90 | -1.49 points |", "| MACs (53 tokens) | 577.76 M |"),
        *("rfprune --model some/folder --task mrpc --constraint 0.5", "seed 3", "torch 2.13.0"),
        *("2048 examples of the training data of mrpc, without their labels", "stored in float16"),
        *("![Heads and neurons kept in every layer](plots/kept.png)", "of 4 each): 3, 0, 4"),
        *("trust_remote_code=True", "load_pruned(", "block layer.0.heads kept its scales"),
        *("cpu, 1 thread, batch 32, 58 tokens", "50% of the original's MACs"),
    ):
        assert part in text, part
    table = text[text.index("| | original") : text.index("Scored on")]
    assert "\n\n|" not in table  # else it is no table in Markdown


def test_it_is_honest_about_noise_and_gaps(report: MakeReport) -> None:
    text = " ".join(render_card(report()).split())
    assert "standard error of a score like this on 408 examples is about 2.0 points" in text
    assert "408 examples of the validation data, with one calibration sample (seed 3)" in text
    assert "were not measured" in text
    assert "licence, apply to this model too" in text
    spearman = " ".join(render_card(report(task="stsb", metric_name="spearmanr")).split())
    assert "standard error" not in spearman
    assert "no error bar was computed for spearmanr" in spearman


def test_labels_are_said_where_they_were_used(report: MakeReport) -> None:
    settings = report()["settings"] | {"use_labels": True}
    assert "with their labels" in render_card(report(settings=settings))


def test_an_undefined_score_has_no_result(report: MakeReport) -> None:
    scores = {"original": {"accuracy": 80.0, "f1": 1.0}, "pruned": {"accuracy": None, "f1": 50.0}}
    pruned = report()["pruned"] | {"score": None}
    undefined = report(scores=scores, pruned=pruned)
    (result,) = metadata(undefined)["model-index"][0]["results"]
    assert [metric["type"] for metric in result["metrics"]] == ["f1"]
    assert "undefined" in render_card(undefined)


def test_the_code_in_the_card_is_python(report: MakeReport) -> None:
    blocks = re.findall(r"```python\n(.*?)```", render_card(report(), "someone/small"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
    assert 'name = "someone/small"' in blocks[0]


@given(st.text(max_size=60))
def test_no_name_breaks_the_metadata(name: str) -> None:
    from tests.report.conftest import make_report

    hostile = make_report(model=f"folder/{name}", warnings=[name], command=name)
    assert metadata(hostile)["pipeline_tag"] == "text-classification"


def test_the_repository_is_filled_in_later(report: MakeReport, tmp_path: Path) -> None:
    path = write_card(report(), tmp_path)
    assert path == tmp_path / CARD_FILE
    assert UNKNOWN_REPOSITORY in path.read_text(encoding="utf-8")
    name_repository(tmp_path, "someone/small")
    assert path.read_text(encoding="utf-8") == render_card(report(), "someone/small")


def test_a_card_that_was_edited_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_text("# mine\n", encoding="utf-8")
    name_repository(tmp_path, "someone/small")
    assert (tmp_path / CARD_FILE).read_text(encoding="utf-8") == "# mine\n"


@pytest.mark.parametrize(
    ("score", "count", "error"), [(50.0, 100, 5.0), (90.0, 900, 1.0), (100.0, 10, 0.0)]
)
def test_the_standard_error_is_that_of_a_proportion(score: float, count: int, error: float) -> None:
    assert standard_error(score, count) == pytest.approx(error)


def test_a_plain_architecture_is_loaded_without_code(report: MakeReport) -> None:
    """Whoever is told to trust code that is not there learns to trust any."""
    custom, plain = (
        report(settings={"method": "curvature", "uniform": uniform}) for uniform in (False, True)
    )
    assert "trust_remote_code=True" in render_card(custom)
    assert "custom_code" in metadata(custom)["tags"]
    text = render_card(plain)
    assert "trust_remote_code" not in text
    assert "modeling_rfprune" not in text
    assert "load_pruned" not in text
    assert "custom_code" not in metadata(plain)["tags"]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ast.parse(code)
    assert "uniform True" in text


def test_the_layers_of_an_encoder_decoder_are_told_apart() -> None:
    text = render_card(make_encoder_decoder_report())
    for line in (
        "- self-attention heads kept, first encoder layer to last (of 4 each): 4, 2",
        "- self-attention heads kept, first decoder layer to last (of 4 each): 0, 0, 0",
        "- cross-attention heads kept, first decoder layer to last (of 4 each): 1, 0, 3",
        "- neurons kept, first encoder layer to last (of 12 each): 12, 9",
        "- neurons kept, first decoder layer to last (of 12 each): 6, 5, 8",
    ):
        assert f"{line}\n" in text
    assert "cross-attention heads kept, first encoder" not in text


@pytest.mark.parametrize("uniform", [False, True])
def test_an_embedder_is_loaded_as_one(report: MakeReport, uniform: bool) -> None:
    """What the hub shows a reader to copy is by this library name."""
    settings = {"method": "curvature", "uniform": uniform}
    kind = {"task": "similarity", "kind": "similarity", "settings": settings}
    alone, embedder = report(**kind), report(**kind, embedder=True)
    assert metadata(alone)["library_name"] == "transformers"
    assert "SentenceTransformer" not in render_card(alone)
    data, text = metadata(embedder), render_card(embedder, "someone/small")
    assert data["library_name"] == "sentence-transformers"
    assert data["pipeline_tag"] == "sentence-similarity"
    assert {"sentence-transformers", "feature-extraction"} <= set(data["tags"])
    assert ("custom_code" in data["tags"]) == (not uniform)
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    ast.parse(code)
    assert 'name = "someone/small"' in code
    assert ("trust_remote_code=True" in code) == (not uniform)
