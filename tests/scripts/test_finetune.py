"""scripts/finetune.py: from an encoder to a checkpoint that rfprune can prune."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rfprune.checkpoints.loading import resolve_task
from rfprune.tasks import evaluation
from rfprune.tasks.label_order import check_labels
from rfprune.tasks.registry import get_task
from scripts import finetune

TinyFolder = Any


@pytest.fixture
def arguments(tiny_folder: TinyFolder, tiny_data_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": tiny_folder("bert", "none"),
        "data-dir": tiny_data_dir,
        "output-dir": tmp_path / "checkpoint",
        "batch-size": 8,
        "learning-rate": 1e-2,
        "epochs": 1,
    }


def flags(task: str, arguments: dict[str, Any]) -> list[str]:
    given = {"task": task} | arguments
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("task", "metric"), [("sst2", "accuracy"), ("stsb", "spearmanr"), ("squad", "f1")]
)
def test_it_makes_a_checkpoint_with_a_head_for_the_task(
    task: str,
    metric: str,
    arguments: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert finetune.main(flags(task, arguments)) == 0
    folder = arguments["output-dir"]
    config = AutoConfig.from_pretrained(folder)
    check_labels(config, get_task(task))
    if task == "sst2":
        assert config.id2label == {0: "negative", 1: "positive"}
    assert AutoTokenizer.from_pretrained(folder).is_fast
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert f"{task} {metric}: " in capsys.readouterr().out


def test_a_checkpoint_of_another_task_gets_a_new_head(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    """As for RTE, which is usually learned from a model of MNLI."""
    assert finetune.main(flags("sst2", arguments | {"max-steps": 1})) == 0
    again = {"model": arguments["output-dir"], "output-dir": tmp_path / "again", "max-steps": 1}
    assert finetune.main(flags("stsb", arguments | again)) == 0
    config = AutoConfig.from_pretrained(tmp_path / "again")
    check_labels(config, get_task("stsb"))
    assert config.num_labels == 1


def test_bf16_trains_other_weights_and_scores_them_in_float32(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, logits = [], []
    tokens = torch.arange(5, 13)[None]
    evaluate_model = evaluation.evaluate_model

    def scored(model: Any, *arguments: Any, **more: Any) -> Any:
        logits.append(model.eval()(input_ids=tokens).logits)
        return evaluate_model(model, *arguments, **more)

    monkeypatch.setattr(evaluation, "evaluate_model", scored)
    for more in ([], ["--bf16"]):
        assert finetune.main(flags("sst2", arguments | {"max-steps": 1}) + more) == 0
        model = AutoModelForSequenceClassification.from_pretrained(arguments["output-dir"])
        assert torch.equal(model(input_ids=tokens).logits, logits[-1])
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(model(input_ids=tokens).logits.float(), logits[-1])
        saved.append(load_file(arguments["output-dir"] / "model.safetensors"))
        shutil.rmtree(arguments["output-dir"])
    exact, rounded = saved
    assert {weight.dtype for weight in rounded.values()} == {torch.float32}
    assert any(not torch.equal(exact[name], rounded[name]) for name in exact)
    assert all((exact[name] - rounded[name]).abs().max() <= 2.1e-2 for name in exact)


def test_a_gpu_without_bfloat16_is_named(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = "rfprune.checkpoints.device.pick_device"
    monkeypatch.setattr(device, lambda _: torch.device("cuda"))
    monkeypatch.setattr("transformers.utils.is_torch_bf16_gpu_available", lambda: False)
    assert finetune.main([*flags("sst2", arguments), "--bf16"]) == 2
    assert "--bf16: this cuda device has no bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "more", "names"),
    [
        (("dull", "funny"), [], {0: "dull", 1: "funny"}),
        (("0", "1"), [], {0: "LABEL_0", 1: "LABEL_1"}),
        (("2", "4"), ["--regression"], {0: "LABEL_0"}),
    ],
)
def test_your_own_table_makes_a_checkpoint_for_it(
    labels: tuple[str, str],
    more: list[str],
    names: dict[int, str],
    arguments: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And what it has learned is task custom again, with the same labels."""
    data = tmp_path / "mine"
    data.mkdir()
    for split in ("train", "validation"):
        lines = [f"a film {number},{labels[number % 2]}\n" for number in range(16)]
        (data / f"{split}.csv").write_text("".join(["review,label\n", *lines]))
    given = [*flags("custom", arguments | {"data-dir": data}), "--text-columns", "review"]
    assert finetune.main(given + more) == 0
    score = "spearmanr" if more else "accuracy"
    assert f"custom {score}: " in capsys.readouterr().out
    folder = str(arguments["output-dir"])
    task = resolve_task("custom", folder, data_dir=data, text_columns=["review"])
    assert task.kind == ("regression" if more else "classification")
    assert AutoConfig.from_pretrained(folder).id2label == names


def test_it_learns(
    arguments: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What it is scored on is here what it was trained on, so that little training is enough."""
    (tmp_path / "data/sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        source = arguments["data-dir"] / "sst2/train.parquet"
        shutil.copyfile(source, tmp_path / f"data/sst2/{split}.parquet")
    accuracies = []
    for epochs, rate in ((1, 1e-9), (25, 5e-3)):
        changes = {"epochs": epochs, "learning-rate": rate, "data-dir": tmp_path / "data"}
        changes["output-dir"] = tmp_path / f"after-{epochs}"
        assert finetune.main(flags("sst2", arguments | changes)) == 0
        line = [text for text in capsys.readouterr().out.splitlines() if "accuracy" in text][-1]
        accuracies.append(float(line.split()[-1]))
    assert accuracies[0] < 75 < 90 < accuracies[1]


def test_the_seed_decides_the_head_and_the_sample(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    def weights(name: str, seed: int) -> bytes:
        folder = tmp_path / name
        changes = {"output-dir": folder, "seed": seed, "max-train-samples": 16}
        assert finetune.main(flags("sst2", arguments | changes)) == 0
        return (folder / "model.safetensors").read_bytes()

    first = weights("first", 1)
    assert weights("again", 1) == first
    assert weights("other", 2) != first
