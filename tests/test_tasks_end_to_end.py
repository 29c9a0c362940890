"""Every kind of task from files on disk to a pruned folder that loads again, by the command.

Deleting this lets a kind of task be scored, pruned or reported as if it were another.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from rfprune import load_pruned
from rfprune.embeddings import POOLING_ENTRY
from rfprune.main import main
from rfprune.report.report_json import read_report
from tests.conftest import WORDS, make_tiny_model, make_tiny_tokenizer, vocabulary

SPLITS = {"train": 24, "validation": 12}


def save_model(folder: Path, model_class: Any, **changes: Any) -> Path:
    """A tiny random BERT with any head, and its tokenizer."""
    config = make_tiny_model(**changes).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def sentence(generator: random.Random, least: int = 4) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(least, 12)))


def write_rows(folder: Path, row: Callable[[random.Random], dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    for split, number in SPLITS.items():
        generator = random.Random(split)
        lines = [json.dumps(row(generator)) for _ in range(number)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def tiny_gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=4, n_inner=12, n_positions=64, vocab_size=len(vocabulary()),
        initializer_range=0.3, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config)


def language(folder: Path) -> tuple[Path, Path]:
    model = folder / "model"
    tiny_gpt2().save_pretrained(model)
    make_tiny_tokenizer("gpt2").save_pretrained(model)
    data = folder / "data"
    data.mkdir()
    for split, number in SPLITS.items():
        generator = random.Random(split)
        text = "\n\n".join(sentence(generator) for _ in range(8 * number))
        (data / f"{split}.txt").write_text(text)
    return model, data


def tagger(folder: Path) -> tuple[Path, Path]:
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    model = save_model(
        folder / "model",
        transformers.BertForTokenClassification,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )

    def row(generator: random.Random) -> dict[str, Any]:
        words = [*sentence(generator).split(), "unheardof"]  # of several pieces
        return {"tokens": words, "ner_tags": [generator.choice(names) for _ in words]}

    return model, write_rows(folder / "data", row)


def chooser(folder: Path) -> tuple[Path, Path]:
    model = save_model(folder / "model", transformers.BertForMultipleChoice)

    def row(generator: random.Random) -> dict[str, Any]:
        endings = {f"ending{i}": sentence(generator) for i in range(3)}
        start = {"sent1": sentence(generator), "sent2": "the"}
        return {**start, **endings, "label": generator.randrange(3)}

    return model, write_rows(folder / "data", row)


def several_labels(folder: Path) -> tuple[Path, Path]:
    names = ["good", "bad", "long"]
    model = save_model(
        folder / "model",
        transformers.BertForSequenceClassification,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        problem_type="multi_label_classification",
    )

    def row(generator: random.Random) -> dict[str, Any]:
        labels = [name for name in names if generator.random() < 0.5]
        return {"text": sentence(generator), "labels": labels}

    return model, write_rows(folder / "data", row)


def embedder(folder: Path) -> tuple[Path, Path]:
    model = save_model(folder / "model", transformers.BertModel)
    pooling = model / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))

    def row(generator: random.Random) -> dict[str, Any]:
        pair = {"sentence1": sentence(generator), "sentence2": sentence(generator)}
        return {**pair, "score": generator.random()}

    return model, write_rows(folder / "data", row)


def images(folder: Path) -> tuple[Path, Path]:
    names = ("cat", "dog")
    model = tiny_vit(id2label=dict(enumerate(names)), label2id={"cat": 0, "dog": 1})
    model.save_pretrained(folder / "model")
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(folder / "model")
    generator = random.Random(0)
    for split, number in SPLITS.items():
        for name in names:
            (folder / "data" / split / name).mkdir(parents=True)
            for place in range(number // 2):
                shades = bytes(generator.randrange(256) for _ in range(3 * 10 * 12))
                image = Image.frombytes("RGB", (10, 12), shades)
                image.save(folder / "data" / split / name / f"{place}.png")
    return folder / "model", folder / "data"


def tiny_vit(**changes: Any) -> Any:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=12,
        image_size=8, patch_size=4, initializer_range=0.3, **changes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.ViTForImageClassification(config)


CASES: dict[str, tuple[Callable[[Path], tuple[Path, Path]], list[str], str, str]] = {
    "language-modeling": (
        language,
        ["--task", "language-modeling", "--max-length", "16"],
        "perplexity",
        "AutoModelForCausalLM",
    ),
    "token-classification": (tagger, [], "f1", "AutoModelForTokenClassification"),
    "multiple-choice": (chooser, [], "accuracy", "AutoModelForMultipleChoice"),
    "multi-label": (several_labels, [], "f1_micro", "AutoModelForSequenceClassification"),
    "image-classification": (images, [], "accuracy", "AutoModelForImageClassification"),
    "similarity": (embedder, ["--task", "similarity"], "spearmanr", "AutoModel"),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Flags of a small run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rfprune.report.latency.MAX_ROUNDS", 1)
    monkeypatch.setattr("rfprune.report.plots.OF_A_RUN", ())
    flags = "--samples 16 --batch-size 4 --constraint 0.5 --output-dir out --no-cache"
    return flags.split()


@pytest.mark.parametrize("kind", CASES)
def test_every_kind_of_task(
    kind: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, flags, metric, auto_class = CASES[kind]
    model, data = make(tmp_path / "given")
    task = flags or ["--task", "custom"]
    arguments = ["--model", str(model), *task, "--data-dir", str(data), *small]
    assert main([*arguments, "--score-stages"]) == 0, capsys.readouterr().err
    report = read_report(tmp_path / "out")
    assert (report["kind"], report["metric_name"]) == (kind, metric)
    assert report["samples"] == 16
    assert 0.3 < report["achieved"]["mac"] <= 0.5
    assert report["divergence"] > 0
    assert [stage["divergence"] > 0 for stage in report["stages"]] == [False, True, True]
    shown = capsys.readouterr().out
    assert f"transformers.{auto_class}.from_pretrained" in shown
    assert ("%" if kind == "language-modeling" else "points") in shown.split(metric)[1][:80]
    assert ("the original goes on" in shown) == (kind == "language-modeling")
    assert auto_class in (tmp_path / "out" / "README.md").read_text()
    again = load_pruned(tmp_path / "out")
    assert type(again).__name__.endswith(type(make_model(kind)).__name__)
    assert kind != "similarity" or getattr(again.config, POOLING_ENTRY) == "cls"
    pruned_on = [*arguments, "--output-dir", "further", "--skip-tune"]
    pruned_on[1] = "out"
    assert main(pruned_on) == 0, capsys.readouterr().err
    further = read_report(tmp_path / "further")
    assert further["original"]["score"] == pytest.approx(report["pruned"]["score"], rel=1e-4)


def make_model(kind: str) -> Any:
    classes = {
        "token-classification": transformers.BertForTokenClassification,
        "multiple-choice": transformers.BertForMultipleChoice,
        "similarity": transformers.BertModel,
    }
    if kind == "image-classification":
        return tiny_vit()
    if kind == "language-modeling":
        return tiny_gpt2()
    chosen = classes.get(kind, transformers.BertForSequenceClassification)
    return chosen(make_tiny_model().config)
