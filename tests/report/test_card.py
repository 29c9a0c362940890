"""The model card has the measurements and the metadata that the hub reads.

Without these tests a card could lose its evaluation results, name a local folder as the base model,
publish private paths, or let a name or a warning break its Markdown.
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
from markdown_it import MarkdownIt
from markupsafe import Markup

from rfprune.report.card import (
    CARD_FILE,
    UNKNOWN_REPOSITORY,
    escape_markdown,
    render_card,
    set_repository,
    standard_error,
    write_card,
)
from tests.report.conftest import make_encoder_decoder_report, make_report

Report = dict[str, Any]
MakeReport = Callable[..., Report]
HOSTILE = "a|b *c* _d_ `e` ``f` <b>g</b> [h](i) ![j](k) ~~l~~ &amp; \\* # $m$ <!-- n\n\n# o"


def metadata(report: Report) -> dict[str, Any]:
    """The metadata as the hub's own library reads it."""
    data: Any = ModelCard(render_card(report)).data
    found: dict[str, Any] = data.to_dict()
    return found


def values_of(data: dict[str, Any]) -> dict[str, float]:
    """The scores of the only evaluation result."""
    (result,) = data["model-index"][0]["results"]
    return {metric["type"]: metric["value"] for metric in result["metrics"]}


def words(text: str) -> str:
    return " ".join(text.split())


def html(card: str) -> str:
    """The Markdown below the metadata, rendered."""
    renderer = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return str(renderer.render(ModelCard(card).text))


def shown(card: str) -> str:
    """The text that a reader of the card sees."""
    return words(str(Markup(html(card)).striptags()))


def test_the_hub_reads_base_model_task_and_results(report: MakeReport) -> None:
    data = metadata(report(data_dir="data"))
    expected = {
        "base_model": "someone/bert-mrpc",
        "pipeline_tag": "text-classification",
        "library_name": "transformers",
        "datasets": ["nyu-mll/glue"],
        "metrics": ["accuracy", "f1"],
    }
    assert expected.items() <= data.items()
    assert {"rfprune", "pruned", "custom_code"} <= set(data["tags"])
    (entry,) = data["model-index"]
    assert entry["name"] == "folder-mrpc-pruned-mac-0.5"
    (result,) = entry["results"]
    assert result["dataset"] == {
        "name": "mrpc (data from a local folder)",
        "type": "nyu-mll/glue",
        "config": "mrpc",
        "split": "validation",
    }
    assert values_of(data) == {"accuracy": 0.789, "f1": 0.85}


def test_metadata_depends_on_task_scores_and_source(report: MakeReport, tmp_path: Path) -> None:
    scores: Any = {"exact_match": 60.0, "f1": 70.5, "HasAns_f1": 80.0}
    squad = report(task="squad_v2", metric_name="f1", scores={"original": scores, "pruned": scores})
    data = metadata(squad)
    assert data["pipeline_tag"] == "question-answering"
    assert data["model-index"][0]["results"][0]["dataset"]["type"] == "rajpurkar/squad_v2"
    assert values_of(data) == {"f1": 70.5, "exact_match": 60.0}
    assert "AutoModelForQuestionAnswering" in render_card(squad)

    custom = report(task="my-own-task")
    assert "model-index" not in metadata(custom)
    assert "Only my-own-task was evaluated" in render_card(custom)
    scores = {"original": {"accuracy": 80.0, "f1": 1.0}, "pruned": {"accuracy": None, "f1": 50.0}}
    undefined = report(scores=scores, pruned=report()["pruned"] | {"score": None})
    assert values_of(metadata(undefined)).keys() == {"f1"}
    assert "undefined" in render_card(undefined)

    folder = tmp_path / "secret" / "checkpoint"
    folder.mkdir(parents=True)
    local = report(model=str(folder), source=str(folder))
    assert "base_model" not in metadata(local)
    text = render_card(local)
    assert "The checkpoint `checkpoint`" in text
    assert "secret" not in text, "a path of this machine stays private"


def test_the_card_has_measurements_command_and_limits(report: MakeReport) -> None:
    card = render_card(report())
    text = shown(card)
    for part in (
        *("accuracy 80.39 78.90 -1.49 points", "MACs (53 tokens) 577.76 M 288.00 M"),
        *("rfprune --model some/folder --task mrpc --constraint 0.5", "seed 3", "torch 2.13.0"),
        *("2048 examples of the training data of mrpc, without their labels", "stored in float16"),
        *(
            "heads kept, first layer to last (of 4 each): 3, 0, 4",
            "Target: pruned to 50% of its MACs",
        ),
        *("trust_remote_code=True", "load_pruned(", "block layer.0.heads kept its scales"),
        *("cpu, 1 thread, batch 32, 58 tokens", "licence apply to this model too"),
        "standard error of such a score on 408 examples is about 2.0 points",
        "408 examples of the validation data and one calibration sample (seed 3)",
    ):
        assert part in text, part
    assert "![Heads and neurons kept in each layer](plots/kept.png)" in card
    early = report(latency={"batch_size": 32, "sequence_length": 58})
    assert "median of several forward passes" in shown(render_card(early))
    labelled = report(settings=report()["settings"] | {"use_labels": True})
    assert "with their labels" in render_card(labelled)
    spearman = shown(render_card(report(task="stsb", metric_name="spearmanr")))
    assert "no standard error was computed for spearmanr" in spearman
    assert "about 2.0 points" not in spearman


@pytest.mark.parametrize("entry", ["warnings", "model", "command", "scores", "versions", "method"])
def test_user_text_is_shown_as_it_is(entry: str, report: MakeReport) -> None:
    """Also within a table, whose rows keep their cells."""
    text = re.sub(r"[/\\]", "", HOSTILE) if entry == "model" else HOSTILE  # not a path
    scores = {name: {text: 1.0} for name in ("original", "pruned")}
    values = {"warnings": [text, text], "scores": scores, "versions": {"rfprune": "1", "x": text}}
    changed = report(**{entry: values.get(entry, text)}, source="/a/local/folder")
    rendered, before = html(render_card(changed)), html(render_card(report(source="/a/folder")))
    assert words(text) in words(str(Markup(rendered).striptags()))
    for tag in ("<h1", "<h2", "<td", "<em", "<strong", "<s>", "<b>", "<a ", "<img", "<!--"):
        expected = before.count(tag)
        if entry == "scores" and tag == "<td":
            expected -= 4  # one score instead of two
        assert rendered.count(tag) == expected, tag


@given(st.text(max_size=60))
def test_no_name_breaks_the_card(name: str) -> None:
    hostile = make_report(model=f"folder/{name}", warnings=[name], command=name)
    assert metadata(hostile)["pipeline_tag"] == "text-classification"
    paragraph = MarkdownIt("commonmark").render(f"Warning: {escape_markdown(name)}")
    assert paragraph.count("<") == 2, "one paragraph and no other element"


def test_the_repository_is_filled_in_later(report: MakeReport, tmp_path: Path) -> None:
    path = write_card(report(), tmp_path)
    assert path == tmp_path / CARD_FILE
    assert UNKNOWN_REPOSITORY in path.read_text(encoding="utf-8")
    set_repository(tmp_path, "someone/small")
    assert path.read_text(encoding="utf-8") == render_card(report(), "someone/small")
    path.write_text("# edited by hand\n", encoding="utf-8")
    set_repository(tmp_path, "someone/small")
    assert path.read_text(encoding="utf-8") == "# edited by hand\n"


@pytest.mark.parametrize(
    ("score", "count", "error"), [(50.0, 100, 5.0), (90.0, 900, 1.0), (100.0, 10, 0.0)]
)
def test_the_standard_error_is_that_of_a_proportion(score: float, count: int, error: float) -> None:
    assert standard_error(score, count) == pytest.approx(error)


@pytest.mark.parametrize("embedder", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
def test_the_code_of_the_card_loads_the_model(
    uniform: bool, embedder: bool, report: MakeReport
) -> None:
    """The hub makes code snippets of its own from the library name."""
    settings = {"method": "curvature", "uniform": uniform}
    kind = {"task": "similarity", "kind": "similarity"} if embedder else {}
    own = report(settings=settings, **kind, embedder=embedder)
    data, text = metadata(own), render_card(own, "someone/small")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        ast.parse(block)
    assert 'name = "someone/small"' in blocks[0]
    assert ("custom_code" in data["tags"]) == ("trust_remote_code=True" in blocks[0])
    assert ("custom_code" in data["tags"]) == (not uniform)
    assert ("uniform True" in text) == uniform
    assert ("SentenceTransformer" in text) == embedder
    if embedder:
        alone = report(settings=settings, **kind, embedder=False)
        assert metadata(alone)["library_name"] == "transformers"
        assert "SentenceTransformer" not in render_card(alone)
        assert data["library_name"] == "sentence-transformers"
        assert data["pipeline_tag"] == "sentence-similarity"
        assert {"sentence-transformers", "feature-extraction"} <= set(data["tags"])
    else:
        assert data["library_name"] == "transformers"
        assert len(blocks) == (1 if uniform else 2)
        code_of_ours = re.search("trust_remote_code|modeling_rfprune|load_pruned", text)
        assert (code_of_ours is None) == uniform


def test_encoder_and_decoder_layers_have_their_own_lines() -> None:
    text = render_card(make_encoder_decoder_report())
    for kind, stack, size, kept in (
        ("self-attention heads", "encoder", 4, "4, 2"),
        ("self-attention heads", "decoder", 4, "0, 0, 0"),
        ("cross-attention heads", "decoder", 4, "1, 0, 3"),
        ("neurons", "encoder", 12, "12, 9"),
        ("neurons", "decoder", 12, "6, 5, 8"),
    ):
        assert f"- {kind} kept, first {stack} layer to last (of {size} each): {kept}\n" in text
    assert "cross-attention heads kept, first encoder" not in text
