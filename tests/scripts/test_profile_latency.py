"""`scripts/profile_latency.py` on tiny models: a table that loads, or one sentence and no file.

Deleting this lets minutes of measuring end without a file, or with half of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rfprune.latency.conditions import conditions_of
from rfprune.latency.table import LatencyTable, check_table, latency_costs
from rfprune.latency.timing import Timing
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of
from scripts import profile_latency as script

TinyFolder = Callable[..., Path]
SHAPE = "--batch-size 2 --sequence-length 5 --device cpu --seconds 0"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "table.json"


def test_a_folder_becomes_a_table_that_fits_its_model(
    tiny_folder: TinyFolder, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_folder()
    flags = f"--model {folder} {SHAPE} --round-to 4 --dtype bfloat16 --output {output}"
    assert script.main(flags.split()) == 0
    table = LatencyTable.load(output)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    layout = layout_of(model)
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    check_table(table, model, layout, conditions_of(model, layout, batch))
    assert table.curves[1].sizes == (0, 4, 8, 12)
    assert latency_costs(table, layout).original == pytest.approx(table.total_ms)
    shown = capsys.readouterr().out
    assert "bfloat16, 2 x 5 tokens" in shown
    assert "units kept" in shown
    assert all(fraction in shown for fraction in ("100%", "75%", "50%", "25%", "0%"))


@pytest.mark.parametrize("head", ["question-answering", "none"])
def test_any_head_will_do(tiny_folder: TinyFolder, output: Path, head: str) -> None:
    flags = f"--model {tiny_folder('distilbert', head)} {SHAPE} --output {output}"
    assert script.main(flags.split()) == 0
    assert LatencyTable.load(output).model.model_type == "distilbert"


def test_a_pruned_model_and_one_of_random_weights(
    tiny_model: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    layout = layout_of(model)
    masks = [torch.ones(block.num_units) for block in layout.blocks]
    masks[0][:2] = 0
    compact(model, layout, masks).save_pretrained(tmp_path / "small")
    flags = f"--model {tmp_path / 'small'} {SHAPE} --output {tmp_path / 'small.json'}"
    assert script.main(flags.split()) == 0
    assert LatencyTable.load(tmp_path / "small.json").model.blocks[0].num_units == 2
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
    monkeypatch.setitem(script.SYNTHETIC, "minilm", tiny | {"intermediate_size": 8})
    flags = f"--synthetic minilm {SHAPE} --output {tmp_path / 'random.json'}"
    assert script.main(flags.split()) == 0
    assert len(LatencyTable.load(tmp_path / "random.json").model.blocks) == 2


def test_an_interruption_leaves_nothing(
    tiny_folder: TinyFolder,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(calls: Sequence[Callable[[], object]], *_: Any, **__: Any) -> list[Timing]:
        calls[-1]()
        raise KeyboardInterrupt

    monkeypatch.setattr("rfprune.latency.profile.time_interleaved", interrupted)
    flags = f"--model {tiny_folder()} {SHAPE} --output {output}"
    assert script.main(flags.split()) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert not list(output.parent.iterdir())
