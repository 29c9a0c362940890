"""The embedded demo: small, complete, and the full checkpoint in all that matters."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfprune.demo import DEMO_TASK, demo_data_dir, demo_path
from rfprune.tasks.label_order import check_labels
from rfprune.tasks.registry import get_task
from rfprune.tasks.splits import load_split

TASK = get_task(DEMO_TASK)
README = (demo_path() / "README.md").read_text(encoding="utf-8")


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load(demo_path())


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    splits = [load_split(TASK, split, demo_data_dir()) for split in ("train", "validation")]
    return [sentence for split in splits for sentence in split["sentence"]]


def test_its_data_are_enough_to_calibrate_and_the_whole_validation_split() -> None:
    train = load_split(TASK, "train", demo_data_dir())
    validation = load_split(TASK, "validation", demo_data_dir())
    assert len(train) >= 2048
    assert len(validation) == 872
    assert sum(validation["label"]) == 444
    assert not set(train["sentence"]) & set(validation["sentence"])


def test_its_readme_names_the_files_as_they_are() -> None:
    """A checkpoint replaced without a new README would keep the old scores and sums."""
    rows = re.findall(r"^\| `(.+?)` \| ([\d,]+) \| `(\w{64})` \|$", README, re.MULTILINE)
    assert len(rows) == 6
    for name, size, digest in rows:
        content = (demo_path() / name).read_bytes()
        assert len(content) == int(size.replace(",", ""))
        assert hashlib.sha256(content).hexdigest() == digest


def test_its_files_are_small_and_its_configuration_says_how_to_run_it(
    demo: tuple[Any, Any],
) -> None:
    """The weights are stored in half precision; the model is meant to run in float32."""
    from safetensors import safe_open

    files = [path for path in demo_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix != ".pyc") <= 30_000_000
    assert all(words in README for words in ("all-MiniLM-L6-v2", "Apache License 2.0"))
    assert all(words in README for words in ("Socher et al.", "accuracy 89.11"))
    check_labels(demo[0].config, TASK)
    assert demo[0].config.id2label == {0: "negative", 1: "positive"}
    assert json.loads((demo_path() / "config.json").read_text())["dtype"] == "float32"
    with safe_open(demo_path() / "model.safetensors", "pt") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert dtypes == {"F16"}


def test_tokenizer_and_embeddings_belong_together(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    rows = model.get_input_embeddings().num_embeddings
    assert len(tokenizer) == rows == model.config.vocab_size < 10_000
    assert sorted(tokenizer.get_vocab().values()) == list(range(rows))
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert tokenizer("a b")["input_ids"][0] == tokenizer.cls_token_id
    assert tokenizer("a b")["input_ids"][-1] == tokenizer.sep_token_id


def test_only_words_it_has_not_kept_are_spelled_out(
    demo: tuple[Any, Any], sentences: list[str]
) -> None:
    _, tokenizer = demo
    encoded = tokenizer(sentences)["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in encoded)
    assert tokenizer.unk_token_id in tokenizer("\U0001f600")["input_ids"], "it does happen"
    pieces = tokenizer.tokenize("supercalifragilistic xylophonist 1789 Zürich")
    assert tokenizer.unk_token not in pieces
    spelled = "".join(piece.removeprefix("##") for piece in pieces)
    assert spelled == "supercalifragilisticxylophonist1789zurich"


def test_it_scores_what_its_readme_says(demo: tuple[Any, Any]) -> None:
    """On a part of the split, to be quick: the dense score is 89 and chance is 50."""
    from rfprune.tasks.evaluation import evaluate_model, prepare_evaluation

    model, tokenizer = demo
    prepared = prepare_evaluation(TASK, tokenizer, demo_data_dir(), limit=128)
    assert evaluate_model(model, prepared).score > 80


@pytest.mark.shared
def test_its_sentences_are_tokenised_as_by_the_full_checkpoint(
    shared: Path, demo: tuple[Any, Any], sentences: list[str]
) -> None:
    from transformers import AutoTokenizer

    full = AutoTokenizer.from_pretrained(shared / "models/minilm-l6-sst2")
    small = demo[1]
    to_text: Callable[[Any, Any], list[list[str]]] = lambda tokenizer, texts: [  # noqa: E731
        tokenizer.convert_ids_to_tokens(row) for row in tokenizer(texts)["input_ids"]
    ]
    assert to_text(small, sentences) == to_text(full, sentences)
    unseen = ["supercalifragilistic"]
    assert to_text(small, unseen) != to_text(full, unseen)


@pytest.mark.shared
def test_other_text_has_unknown_words_only_where_the_full_checkpoint_has(
    shared: Path, demo: tuple[Any, Any]
) -> None:
    from transformers import AutoTokenizer

    full = AutoTokenizer.from_pretrained(shared / "models/minilm-l6-sst2")
    small = demo[1]
    texts = load_split(get_task("squad"), "validation", shared / "data")["context"][::40]
    counts = {"small": 0, "full": 0}
    for name, tokenizer in (("small", small), ("full", full)):
        for row in tokenizer(texts, truncation=False, verbose=False)["input_ids"]:
            counts[name] += row.count(tokenizer.unk_token_id)
    assert counts["small"] == counts["full"] > 0


@pytest.mark.shared
def test_its_logits_are_those_of_the_full_checkpoint(shared: Path, demo: tuple[Any, Any]) -> None:
    from rfprune.tasks.evaluation import evaluate_model, prepare_evaluation

    logits = []
    for model, tokenizer in (demo, load(shared / "models/minilm-l6-sst2")):
        prepared = prepare_evaluation(TASK, tokenizer, demo_data_dir(), limit=64)
        logits.append(evaluate_model(model, prepared).logits[0])
    assert np.ptp(logits[0]) > 1
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
