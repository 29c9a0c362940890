"""scripts/finetune.py --teacher: a pruned model comes nearer to its original, and stays pruned.

Without these tests it could be trained on labels, or be saved as a model that does not load.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rfprune import Constraint, Settings, load_pruned, prune
from rfprune.tasks.divergence import divergence_of_logits
from scripts import finetune
from scripts.finetune import distillation_loss, hidden_state_loss
from tests.conftest import TinyFolder

Tiny = Callable[..., Any]
Make = Callable[..., tuple[list[str], Path]]


@pytest.fixture
def flags(
    tiny_folder: TinyFolder,
    tiny_model: Tiny,
    tiny_tokenizer: Tiny,
    tiny_batch: Tiny,
    tiny_data_dir: Path,
    tmp_path: Path,
) -> Make:
    """`flags(task, model_type, head)`: those of a recovery to the folder out, and the original."""

    def make(
        task: str = "mrpc",
        model_type: str = "bert",
        head: str = "sequence-classification",
        **more: Any,
    ) -> tuple[list[str], Path]:
        uniform, data = more.pop("uniform", False), more.pop("data", tiny_data_dir)
        original = tiny_folder(model_type, head, **more)
        from rfprune.checkpoints.loading import load, resolve_task

        known = resolve_task(task, str(original), data_dir=data)
        loaded = load(str(original), known, device=torch.device("cpu"), dtype=torch.float32)
        ratio = 0.95 if uniform else 0.5
        settings = Settings(tune=False, uniform=uniform)
        result = prune(loaded.model, [tiny_batch(4)], Constraint("mac", ratio), settings)
        result.save(tmp_path / "pruned", loaded.tokenizer)
        text = f"--model {tmp_path / 'pruned'} --teacher {original} --task {task} --epochs 4"
        text += f" --data-dir {data} --output-dir {tmp_path / 'out'} --batch-size 8"
        return [*text.split(), "--learning-rate", "3e-3"], original

    return make


@pytest.mark.parametrize(
    ("task", "model_type", "more"),
    [
        ("mrpc", "bert", {}),
        ("squad", "distilbert", {"head": "question-answering"}),
        ("mrpc", "bert", {"uniform": True}),
    ],
)
def test_it_comes_nearer_to_the_original_and_stays_pruned(
    task: str,
    model_type: str,
    more: dict[str, Any],
    flags: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, _ = flags(task, model_type, **more)
    assert finetune.main([*given, "--hidden-states", "0.1"]) == 0
    out, pruned = tmp_path / "out", tmp_path / "pruned"
    report = json.loads((out / "recovery.json").read_text())
    assert report["steps"] > 4
    if "uniform" not in more:  # a tiny model can lose next to nothing then
        assert report["divergence"]["after"] < 0.8 * report["divergence"]["before"]
    before, after = load_pruned(pruned), load_pruned(out)
    shapes = [
        {name: value.shape for name, value in one.state_dict().items()} for one in (before, after)
    ]
    assert shapes[0] == shapes[1]
    assert (out / "config.json").read_bytes() == (pruned / "config.json").read_bytes()
    names = {path.name for path in pruned.iterdir()} - {"README.md"} | {"recovery.json"}
    assert {path.name for path in out.iterdir()} == names
    assert f"{task} {report['metric_name']}: " in capsys.readouterr().out


def test_a_language_model_is_recovered_on_text_alone(flags: Make, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text("a warm film . the movie is dull\n" * 60)
    given, _ = flags("language-modeling", "llama", "causal-lm", data=tmp_path)
    assert finetune.main([*given, "--max-length", "16", "--max-steps", "12"]) == 0
    report = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert report["steps"] == 12
    assert report["divergence"]["after"] < 0.8 * report["divergence"]["before"]


@pytest.mark.parametrize(
    ("kind", "shape", "name"),
    [
        ("classification", (4, 3), "logits"),
        ("regression", (4, 1), "logits"),
        ("multi-label", (4, 3), "logits"),
    ],
)
def test_the_loss_is_the_divergence_that_reports_show(
    kind: Any, shape: tuple[int, int], name: str
) -> None:
    ours, theirs = torch.randn(
        2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    loss = distillation_loss({name: ours}, {name: theirs}, None, kind)
    expected = divergence_of_logits((theirs.numpy(),), (ours.numpy(),), kind)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss({name: ours}, {name: ours}, None, kind)) == pytest.approx(
        0, abs=1e-6
    )


def test_padding_and_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 2, 5, 3, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    for kind, first, second in (
        ("language-modeling", {"logits": ours}, {"logits": theirs}),
        ("question-answering", {"start_logits": ours[..., 0]}, {"start_logits": theirs[..., 0]}),
    ):
        loss = distillation_loss(first, second, mask, kind, 2.0)
        changed = {name: value.clone() for name, value in first.items()}
        for value in changed.values():
            value[1, 2:] *= 5
        assert distillation_loss(changed, second, mask, kind, 2.0) == loss
        assert distillation_loss(first, second, mask, kind, 1.0) != loss
        for value in changed.values():
            value[1, 0] *= 5
        assert distillation_loss(changed, second, mask, kind, 2.0) != loss
    states = {"hidden_states": (theirs, ours)}
    assert float(hidden_state_loss(states, {"hidden_states": (theirs, theirs)}, mask)) > 0
    assert float(hidden_state_loss(states, states, mask)) == 0


def test_a_teacher_that_does_not_fit_is_refused_before_any_work(
    flags: Make,
    tiny_folder: TinyFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, original = flags()
    other = tiny_folder("bert", seed=3, num_hidden_layers=3)
    larger = tiny_folder("bert", seed=4, vocab_size=900)
    labels = tiny_folder("bert", seed=5, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    for changes, words in (
        ({"--teacher": str(tmp_path / "pruned")}, "is --model itself"),
        ({"--teacher": str(labels)}, "give the model that was pruned"),
        ({"--teacher": str(larger)}, "have other vocabularies"),
        ({"--teacher": str(other), "--hidden-states": "1"}, "equally many layers"),
        ({"--teacher": "no/such/model"}, "no/such/model"),
        ({"--temperature": "0"}, "--temperature 0.0: it must be a number above 0"),
        ({"--task": "mprc"}, "did you mean mrpc"),
        ({"--regression": ""}, "--regression belongs to --task custom"),
    ):
        pairs = dict(zip(given[::2], given[1::2], strict=True)) | changes
        assert finetune.main([part for pair in pairs.items() for part in pair if part]) == 2, words
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("finetune: error: ") and words in message
        assert not (tmp_path / "out").exists()
    alone = [part for part in given if part not in ("--teacher", str(original))]
    assert finetune.main([*alone, "--hidden-states", "1"]) == 2
    assert "does nothing without --teacher" in capsys.readouterr().err
