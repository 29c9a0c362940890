"""A checkpoint is loaded completely, or refused in one sentence that names the problem.

Without these a random head, another label order or a damaged file could reach the pruning.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rfprune.checkpoints.loading import (
    load,
    quiet_transformers,
    resolve_data_dir,
    resolve_max_length,
    resolve_model,
    resolve_task,
)
from rfprune.embeddings import pooling_of
from rfprune.errors import RfpruneWarning, UserError
from rfprune.tasks.own_data import similarity_task
from rfprune.tasks.registry import get_task

MRPC, SQUAD = get_task("mrpc"), get_task("squad")
CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a tiny fine-tuned checkpoint, to spoil."""
    return Path(shutil.copytree(tiny_folder(), tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    """Set entries of config.json; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, task: str = "mrpc") -> str:
    """The one sentence with which a checkpoint is refused."""
    with pytest.raises(UserError) as caught:
        load(str(folder), get_task(task), device=CPU, dtype=torch.float32)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("task", "head"), [("mrpc", "sequence-classification"), ("squad", "question-answering")]
)
def test_a_good_checkpoint_is_loaded(
    task: str, head: str, tiny_folder: Callable[..., Path], tiny_model: Callable[..., Any]
) -> None:
    loaded = load(str(tiny_folder("bert", head)), get_task(task), device=CPU, dtype=torch.float32)
    expected = tiny_model("bert", head).state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert not loaded.model.training
    assert loaded.tokenizer("a film")["input_ids"][0] == loaded.tokenizer.cls_token_id


def test_weights_have_the_requested_dtype(folder: Path) -> None:
    change_weights(
        folder, lambda weights: weights.update({k: v.half() for k, v in weights.items()})
    )
    loaded = load(str(folder), MRPC, device=CPU, dtype=torch.float32)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_weights_in_several_files_are_loaded(
    tiny_model: Callable[..., Any], tiny_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="10KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = load(str(tmp_path), MRPC, device=CPU, dtype=torch.float32)
    assert torch.equal(loaded.model.classifier.weight, tiny_model().classifier.weight)


def _config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: change_config(folder, **changes)


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    return lambda folder: change_weights(folder, change)


DENSE, QUERY = "layer.1.output.dense.weight", "bert.encoder.layer.1.attention.self.query.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "unsupported model type": (
        _config(model_type="gpt_neo"), ("'gpt_neo'", "bert", "roberta", "distilbert", "mpnet"),
    ),
    "another shape": (
        _config(intermediate_size=24),
        ("'bert.encoder.layer.0.intermediate.dense.bias'", "(12,)", "(24,)", "do not belong"),
    ),
    "weight missing": (
        _weights(lambda weights: weights.pop(f"bert.encoder.{DENSE}")), ("lacks a weight", DENSE),
    ),
    "fewer layers": (_config(num_hidden_layers=3), ("lacks 16 weights",)),
    # transformers would drop a layer silently
    "more layers": (
        _config(num_hidden_layers=1), ("holds 'bert.encoder.layer.1.", "do not belong together"),
    ),
    "heads": (_config(num_attention_heads=3), ("multiple of the number of attention heads",)),
    "activation": (_config(hidden_act="magic"), ("unknown 'magic'",)),
    "no head by its config": (
        _config(architectures="BertModel"), ("it is a BertModel", "no trained head for task mrpc"),
    ),
    # a config may claim a head that was never trained
    "no head by its weights": (
        _weights(lambda weights: weights.pop("classifier.weight")),
        ("no trained head for task mrpc (classifier.weight is missing)", "fine-tune"),
    ),
    **{
        f"labels {id2label}": (_config(id2label=id2label), ("id2label must map the ids to names",))
        for id2label in ("equivalent", {"zero": "a", "one": "b"}, [0, 1])
    },
    "not a number": (
        _weights(lambda weights: weights[QUERY][0, 0].fill_(float("nan"))), (QUERY,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_refused(case: str, folder: Path) -> None:
    damage, parts = DAMAGE[case]
    damage(folder)
    sentence = refused(folder)
    for part in parts:
        assert part in sentence, sentence


def test_a_pickle_is_not_read(folder: Path, tmp_path: Path) -> None:
    """It would run this code if it were."""

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "it ran",)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Code()))
    sentence = refused(folder)
    assert "pickle (pytorch_model.bin)" in sentence
    assert "save_pretrained()" in sentence
    assert not (tmp_path / "it ran").exists()


def test_weights_of_another_head_do_no_harm(folder: Path) -> None:
    """What training left behind outside the layers is not read."""
    extra = {"cls.predictions.bias": torch.ones(3)}
    change_weights(folder, lambda weights: weights.update(extra))
    load(str(folder), MRPC, device=CPU, dtype=torch.float32)


def test_a_part_of_the_weights_is_missing(
    tiny_model: Callable[..., Any], tiny_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="10KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    part = min(tmp_path.glob("model-*.safetensors"))
    part.unlink()
    assert part.name in refused(tmp_path)


def test_the_head_of_another_kind_of_task(folder: Path) -> None:
    assert "not a ...ForQuestionAnswering" in refused(folder, "squad")


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_an_encoder_decoder_is_no_embedder(model_type: str, folder: Path) -> None:
    """An encoder taken out of one has the same type, and lacks the other half of the weights."""
    change_config(folder, model_type=model_type, architectures=["T5EncoderModel"])
    with pytest.raises(UserError, match=f"encoder-decoder \\({model_type}\\)"):
        load(str(folder), similarity_task(), device=CPU, dtype=torch.float32)


def test_no_more_is_read_than_sentence_transformers_reads(folder: Path) -> None:
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 11}')
    change_config(folder, architectures=None)
    task = similarity_task()
    loaded = load(str(folder), task, device=CPU, dtype=torch.float32)
    assert pooling_of(loaded.model.config) == "cls"
    assert resolve_max_length(loaded, task, None) == 11
    assert "modules.json" in loaded.files
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": null}')
    loaded = load(str(folder), task, device=CPU, dtype=torch.float32)
    assert resolve_max_length(loaded, task, None) > 11


def test_a_tokenizer_of_another_model(
    tiny_model: Callable[..., Any], tiny_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_model(vocab_size=10).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "the model has 10 embeddings" in refused(tmp_path)


def test_remote_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    change_config(folder, auto_map={"AutoModelForSequenceClassification": "code.Model"})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')")
    with pytest.warns(RfpruneWarning, match=r"code of its own .* which is not run"):
        load(str(folder), MRPC, device=CPU, dtype=torch.float32)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "torchao"])
def test_a_quantised_checkpoint_is_refused_before_its_weights_are_read(
    method: str, folder: Path
) -> None:
    change_config(folder, quantization_config={"quant_method": method, "load_in_4bit": True})
    (folder / "model.safetensors").write_text("damaged")
    sentence = refused(folder)
    assert f"is quantised ({method})" in sentence
    assert "original checkpoint" in sentence
    assert "download" not in sentence


def test_attention_that_is_not_installed(folder: Path) -> None:
    change_config(folder, attn_implementation="flash_attention_2")
    sentence = refused(folder)
    assert "FlashAttention2" in sentence
    assert "remove the entry" in sentence
    assert "download" not in sentence


@pytest.mark.parametrize("name", ["bert-base", "owner/model"])
def test_what_is_not_on_the_hub_says_what_was_wanted_and_the_ways_out(name: str) -> None:
    sentence = refused(Path(name))
    assert resolve_model(name, MRPC) in sentence
    assert "--model demo" in sentence
    assert "folder" in sentence


@pytest.mark.parametrize("before", [None, "0"])
def test_loading_leaves_the_environment_alone(
    before: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers converts pickles of the hub in the background unless a variable forbids it."""
    name = "DISABLE_SAFETENSORS_CONVERSION"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with quiet_transformers():
        assert os.environ[name] == (before or "1")
    load(str(folder), MRPC, device=CPU, dtype=torch.float32)
    (folder / "config.json").unlink()
    refused(folder)
    assert os.environ.get(name) == before


def test_the_demo_has_one_task() -> None:
    assert "--task sst2" in refused(Path("demo"))
    assert (Path(resolve_model("demo", get_task("sst2"))) / "config.json").is_file()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a table of somebody's own."""
    for split in ("train", "validation"):
        path = tmp_path / "data" / f"{split}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("text,label\nfine,1\nbad,0\n")
    return tmp_path / "data"


def test_a_known_task_is_chosen_by_its_name() -> None:
    assert resolve_task("mrpc", "/no/such/model") == MRPC
    with pytest.raises(UserError, match="Unknown task"):
        resolve_task("mprc", "demo")


def test_custom_is_what_checkpoint_and_data_make(
    data: Path, tiny_folder: Callable[..., Path]
) -> None:
    demo = resolve_task("custom", "demo", data_dir=data)
    assert (demo.label_names, demo.text_columns) == (("negative", "positive"), ("text",))
    loaded = load("demo", demo, device=CPU, dtype=torch.float32)
    assert resolve_max_length(loaded, demo, None) == 128
    loaded.tokenizer.model_max_length = 100
    assert resolve_max_length(loaded, demo, None) == 100
    number = resolve_task("custom", str(tiny_folder(num_labels=1)), data_dir=data)
    assert number.kind == "regression"


def test_custom_is_refused_before_weights_are_read(
    data: Path, folder: Path, tiny_folder: Callable[..., Path]
) -> None:
    def refusal(model: Path | str) -> str:
        with pytest.raises(UserError) as caught:
            resolve_task("custom", str(model), data_dir=data)
        return str(caught.value)

    (folder / "model.safetensors").write_bytes(b"never read")
    assert resolve_task("custom", str(folder), data_dir=data).num_labels == 2
    change_config(folder, problem_type="multi_label_classification")
    assert resolve_task("custom", str(folder), data_dir=data).kind == "multi-label"
    change_config(folder, architectures=["GPT2LMHeadModel"])
    assert "--task language-modeling" in refusal(folder)
    change_config(folder, architectures=["BertForSequenceClassification"])
    change_config(folder, problem_type=None, model_type="xlnet")
    assert "'xlnet'" in refusal(folder)
    answers = refusal(tiny_folder("bert", "question-answering"))
    assert "no trained head for task custom" in answers
    assert "fine-tune it on your data" in answers
    assert "task custom" in refusal("bert-base"), "no alias has a checkpoint for it"
    assert "does not exist" in refusal("./missing")


def test_the_demo_brings_its_data(tmp_path: Path) -> None:
    found = resolve_data_dir("demo", None)
    assert found is not None
    assert (found / "sst2").is_dir()
    assert resolve_data_dir("demo", tmp_path) == tmp_path
    assert resolve_data_dir("other", None) is None


@pytest.mark.parametrize(
    ("model_type", "positions"), [("bert", 20), ("roberta", 19), ("mpnet", 18), ("distilbert", 20)]
)
def test_no_more_tokens_than_positions(
    model_type: str, positions: int, tiny_folder: Callable[..., Path]
) -> None:
    """The longest that is allowed runs; one token more would fail inside the model."""
    path = tiny_folder(model_type, max_position_embeddings=20)
    loaded = load(str(path), MRPC, device=CPU, dtype=torch.float32)
    assert resolve_max_length(loaded, MRPC, None) == positions
    assert resolve_max_length(loaded, MRPC, 12) == 12
    with pytest.raises(UserError, match=f"{positions} positions"):
        resolve_max_length(loaded, MRPC, positions + 1)
    longest = torch.full((1, positions), 7)
    loaded.model(input_ids=longest)
    with pytest.raises((IndexError, RuntimeError)):
        loaded.model(input_ids=torch.full((1, positions + 1), 7))


def test_the_task_s_length_where_there_is_room(tiny_folder: Callable[..., Path]) -> None:
    loaded = load(str(tiny_folder()), MRPC, device=CPU, dtype=torch.float32)
    assert resolve_max_length(loaded, MRPC, None) == MRPC.max_length
    assert resolve_max_length(loaded, SQUAD, None) == SQUAD.max_length
