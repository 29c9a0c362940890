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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rfprune import load_pruned
from rfprune.embeddings import POOLING_ENTRY
from rfprune.main import main
from rfprune.report.report_json import read_report
from rfprune.settings import WritingSettings
from rfprune.tasks.registry import PER_TOKEN_KINDS
from rfprune.tasks.seq2seq import generation_config
from tests.conftest import WORDS, make_tiny_model, make_tiny_tokenizer

SPLITS = {"train": 24, "validation": 12}
LIBRARY = "sentence_transformers.models"


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


def language(folder: Path) -> tuple[Path, Path]:
    model = folder / "model"
    make_tiny_model("gpt2", "causal-lm").save_pretrained(model)
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
    (pooling / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 16, "pooling_mode_cls_token": True})
    )
    modules = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    entries = [
        {"idx": place, "name": str(place), "path": path, "type": f"{LIBRARY}.{name}"}
        for place, (name, path) in enumerate(modules.items())
    ]
    (model / "modules.json").write_text(json.dumps(entries))
    (model / "sentence_bert_config.json").write_text('{"max_seq_length": 10}')

    def row(generator: random.Random) -> dict[str, Any]:
        pair = {"sentence1": sentence(generator), "sentence2": sentence(generator)}
        return {**pair, "score": generator.random()}

    return model, write_rows(folder / "data", row)


def images(folder: Path) -> tuple[Path, Path]:
    names = ("cat", "dog")
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {"cat": 0, "dog": 1}}
    make_tiny_model("vit", **labels).save_pretrained(folder / "model")
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


def translator(folder: Path) -> tuple[Path, Path]:
    model = folder / "model"
    make_tiny_model("bart", "seq2seq-lm").save_pretrained(model)
    make_tiny_tokenizer("bart").save_pretrained(model)

    def row(generator: random.Random) -> dict[str, Any]:
        return {"document": sentence(generator), "summary": sentence(generator)}

    return model, write_rows(folder / "data", row)


Case = tuple[Callable[[Path], tuple[Path, Path]], str, str, str, str]
CASES: dict[str, Case] = {
    "language-modeling": (
        *(language, "language-modeling --max-length 16", "perplexity"),
        *("AutoModelForCausalLM", "GPT2LMHeadModel"),
    ),
    "token-classification": (
        *(tagger, "custom", "f1"),
        *("AutoModelForTokenClassification", "BertForTokenClassification"),
    ),
    "multiple-choice": (
        *(chooser, "custom", "accuracy"),
        *("AutoModelForMultipleChoice", "BertForMultipleChoice"),
    ),
    "multi-label": (
        *(several_labels, "custom", "f1_micro"),
        *("AutoModelForSequenceClassification", "BertForSequenceClassification"),
    ),
    "image-classification": (
        *(images, "custom", "accuracy"),
        *("AutoModelForImageClassification", "ViTForImageClassification"),
    ),
    "seq2seq": (
        *(translator, "seq2seq --max-new-tokens 6 --num-beams 2", "chrf"),
        *("AutoModelForSeq2SeqLM", "BartForConditionalGeneration"),
    ),
    "similarity": (embedder, "similarity", "spearmanr", "AutoModel", "BertModel"),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Flags of a small run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", ())
    flags = "--samples 16 --batch-size 4 --constraint 0.5 --output-dir out --no-cache"
    return flags.split()


@pytest.mark.parametrize("kind", CASES)
def test_every_kind_of_task(
    kind: str, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, task, metric, auto_class, model_class = CASES[kind]
    model, data = make(tmp_path / "given")
    arguments = ["--model", str(model), "--task", *task.split(), "--data-dir", str(data), *small]
    assert main([*arguments, "--score-stages"]) == 0, capsys.readouterr().err
    report = read_report(tmp_path / "out")
    assert (report["kind"], report["metric_name"]) == (kind, metric)
    assert report["samples"] == 16
    assert 0.3 < report["achieved"]["mac"] <= 0.5
    assert report["divergence"] > 0
    assert [stage["divergence"] > 0 for stage in report["stages"]] == [False, True, True]
    shown = capsys.readouterr().out
    loader = f"transformers.{auto_class}.from_pretrained("
    embeds = "sentence_transformers.SentenceTransformer("
    assert (embeds if kind == "similarity" else loader) in shown
    assert ("%" if kind == "language-modeling" else "points") in shown.split(metric)[1][:80]
    assert ("Original: " in shown) == (kind in PER_TOKEN_KINDS)
    assert ("in nats per token" in shown) == (kind in PER_TOKEN_KINDS)
    assert auto_class in (tmp_path / "out" / "README.md").read_text()
    again = load_pruned(tmp_path / "out")
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (tmp_path / "out" / name).is_file() == (kind == "similarity")
    assert type(again).__name__.endswith(model_class)
    assert kind != "similarity" or getattr(again.config, POOLING_ENTRY) == "cls"
    pruned_on = [*arguments, "--output-dir", "further", "--skip-tune"]
    pruned_on[1] = "out"
    assert main(pruned_on) == 0, capsys.readouterr().err
    further = read_report(tmp_path / "further")
    assert further["embedder"] == report["embedder"] == (kind == "similarity")
    assert further["original"]["score"] == pytest.approx(report["pruned"]["score"], rel=1e-4)


def test_an_encoder_decoder_classifies(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its decoder reads what the encoder reads, which only the model knows."""
    make_tiny_model("bart").save_pretrained(tmp_path / "model")
    make_tiny_tokenizer("bart").save_pretrained(tmp_path / "model")

    def row(generator: random.Random) -> dict[str, Any]:
        return {"text": sentence(generator), "label": generator.randrange(3)}

    data = write_rows(tmp_path / "data", row)
    arguments = ["--model", str(tmp_path / "model"), "--task", "custom", "--data-dir", str(data)]
    assert main([*arguments, *small]) == 0, capsys.readouterr().err
    report = read_report(tmp_path / "out")
    assert report["divergence"] > 0
    # what the decoder makes may be of another length than what it reads
    counted = report["pruned"]["macs"] / report["original"]["macs"]
    assert counted == pytest.approx(report["achieved"]["mac"])
    assert counted <= 0.5
    assert [set(layer) for layer in report["layers"]][1:3] == [
        *({"heads", "neurons"}, {"heads", "cross_heads", "neurons"})
    ]
    assert type(load_pruned(tmp_path / "out")).__name__ == "BartForSequenceClassification"
    latency = [*arguments, *small, "--output-dir", "other", "--metric", "latency"]
    assert main(latency) == 2
    shown = capsys.readouterr().err
    assert "encoder-decoder" in shown
    assert "mac, params or memory" in shown


def test_what_a_pruned_translator_writes_is_in_its_report(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Also when its own code loads it; `--max-drop` finds a size, for targets of its own."""
    model, data = translator(tmp_path)
    original = transformers.AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def written(one: Any, source: str) -> str:
        config = generation_config(one, WritingSettings(max_new_tokens=6))
        inputs = tokenizer(source, return_tensors="pt")
        return str(tokenizer.decode(one.generate(**inputs, generation_config=config)[0], True))

    rows = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "summary": written(original, row["document"])}) for row in rows]
    (data / "validation.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr("rfprune.max_drop.rules.MAX_TRIALS", 1)
    flags = ["--model", str(model), "--task", "seq2seq", "--data-dir", str(data), *small]
    place = flags.index("--constraint")
    flags[place : place + 2] = ["--max-drop", "99"]
    assert main([*flags, "--max-new-tokens", "6"]) == 0, capsys.readouterr().err
    report = read_report(tmp_path / "out")
    assert report["original"]["score"] == pytest.approx(100)
    assert report["divergence"] > 0 < report["max_drop"]["path"][0]["divergence"]
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained("out", trust_remote_code=True).eval()
    assert type(again).__module__.startswith("transformers_modules")
    for sample, row in zip(report["written"], rows, strict=False):
        for name, one in (("original", original), ("pruned", again)):
            assert sample[name] == " ".join(written(one, row["document"]).split())
    assert any(one["pruned"] != one["original"] for one in report["written"])


def grouped_queries(folder: Path) -> tuple[Path, Path]:
    """A Qwen2 with two query heads to a key and a value, and a byte-level tokenizer as its own."""
    _, data = language(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(data / "train.txt")], trainer)
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    config = transformers.Qwen2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        intermediate_size=20, max_position_embeddings=64, vocab_size=len(own),
        initializer_range=0.3, tie_word_embeddings=True, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.Qwen2ForCausalLM(config).save_pretrained(folder / "qwen2")
    own.save_pretrained(folder / "qwen2")
    return folder / "qwen2", data


def test_a_decoder_of_grouped_queries_writes_when_it_is_loaded_again(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its own code, with a cache: what it would write without one, and what was reported."""
    model, data = grouped_queries(tmp_path)
    flags = ["--model", str(model), "--task", "language-modeling", "--data-dir", str(data)]
    assert main([*flags, *small, "--max-length", "16"]) == 0, capsys.readouterr().err
    report = read_report(tmp_path / "out")
    kept = [layer["heads"] for layer in report["layers"]]
    assert 0 < sum(kept) < 9, "groups, not query heads, are counted, and some are gone"
    assert report["divergence"] > 0

    again = transformers.AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True).eval()
    assert type(again).__module__.startswith("transformers_modules")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    text = (data / "validation.txt").read_text()
    ids = torch.tensor([tokenizer(text)["input_ids"][:8]])  # half of the first block
    written = again.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0)
    expected = ids
    with torch.no_grad():
        while expected.shape[1] < 40:
            chosen = again(expected, use_cache=False).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, chosen], 1)
    assert torch.equal(written, expected)
    words = " ".join(tokenizer.decode(written[0, 8:]).split())
    assert words == report["continuations"]["pruned"] != report["continuations"]["original"]
