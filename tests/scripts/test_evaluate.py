"""`scripts/evaluate.py` end to end: what it prints, what it writes, how it fails.

Without these the script could score another thing than the package does, or end in a traceback.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rfprune.model.checkpoint import save_pruned
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of
from rfprune.tasks.evaluation import evaluate_model, prepare_evaluation
from rfprune.tasks.registry import get_task
from scripts.evaluate import main

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate.py"
TinyFolder = Callable[..., Path]
TinyModel = Callable[..., Any]
TinyTokenizer = Callable[..., Any]


def test_it_scores_as_the_package_does(
    tiny_folder: TinyFolder,
    tiny_model: TinyModel,
    tiny_tokenizer: TinyTokenizer,
    tiny_data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "scores.json"
    flags = f"--model {tiny_folder('bert')} --task mrpc --data-dir {tiny_data_dir}"
    flags += f" --limit 20 --seed 5 --batch-size 3 --device cpu --output {output}"
    assert main(flags.split()) == 0
    evaluation_set = prepare_evaluation(
        get_task("mrpc"), tiny_tokenizer("bert"), tiny_data_dir, limit=20, seed=5
    )
    expected = evaluate_model(tiny_model("bert"), evaluation_set)
    written = json.loads(output.read_text())
    assert written["scores"] == expected.scores
    assert written["score"] == expected.scores["accuracy"]
    assert (written["examples"], written["limit"], written["seed"]) == (20, 20, 5)
    assert written["splits"] == {"validation": 20}
    assert ["below the" in warning for warning in written["warnings"]] in ([], [True]), "untrained"
    printed = capsys.readouterr().out
    assert f"{expected.scores['f1']:.2f}" in printed
    assert "20 examples" in printed


def test_it_scores_a_pruned_model_as_itself(
    tiny_model: TinyModel,
    tiny_tokenizer: TinyTokenizer,
    tiny_data_dir: Path,
    tmp_path: Path,
) -> None:
    model, tokenizer = tiny_model("bert"), tiny_tokenizer("bert")
    layout = layout_of(model)
    masks = [(torch.arange(block.num_units) % 2).float() for block in layout.blocks]
    small = compact(model, layout, masks)
    save_pruned(small, layout, masks, tmp_path / "small", tokenizer)
    output = tmp_path / "scores.json"
    flags = f"--model {tmp_path / 'small'} --task stsb --data-dir {tiny_data_dir}"
    assert main(flags.split()) == 2  # two labels are no regression
    flags = flags.replace("stsb", "mrpc") + f" --output {output}"
    assert main(flags.split()) == 0
    evaluation_set = prepare_evaluation(get_task("mrpc"), tokenizer, tiny_data_dir)
    written = json.loads(output.read_text())
    assert written["scores"] == evaluate_model(small, evaluation_set).scores
    assert written["params"] < sum(parameter.numel() for parameter in model.parameters())


def test_it_answers_questions(
    tiny_folder: TinyFolder, tiny_data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_folder("distilbert", "question-answering")
    for task, score in (("squad", "exact_match"), ("squad_v2", "NoAns_f1")):
        flags = f"--model {folder} --task {task} --data-dir {tiny_data_dir} --max-length 64"
        assert main(flags.split()) == 0
        assert score in capsys.readouterr().out


def test_it_scores_your_own_table(
    tiny_folder: TinyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "mine"
    data.mkdir()
    for split in ("train", "validation"):
        (data / f"{split}.csv").write_text("review,verdict\nfine film,LABEL_1\nbad plot,label_0\n")
    flags = f"--model {tiny_folder('bert')} --task custom --data-dir {data} --text-columns review"
    assert main(flags.split()) == 2
    assert "--label-column" in capsys.readouterr().err
    output = tmp_path / "scores.json"
    assert main([*flags.split(), "--label-column", "verdict", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert set(written["scores"]) == {"accuracy", "f1_macro"}
    assert written["splits"] == {"validation": 2}
    assert main([*flags.replace("custom", "sst2").split()]) == 2
    assert "belongs to --task custom" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing(
    tiny_folder: TinyFolder,
    tiny_data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("rfprune.tasks.evaluation.evaluate_model", interrupt)
    flags = f"--model {tiny_folder('bert')} --task mrpc --data-dir {tiny_data_dir}"
    assert main([*flags.split(), "--output", str(tmp_path / "scores.json")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_help_and_bad_flags_answer_before_torch_is_imported() -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['evaluate.py', '--model', 'x', '--task', 'sst2', '--device', 'tpu']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stopped:\n"
        "    sys.exit(3 if 'torch' in sys.modules else stopped.code)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=SCRIPT.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert "Unknown device 'tpu'" in finished.stderr
