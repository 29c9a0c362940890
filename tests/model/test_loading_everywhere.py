"""Pruned models work in pipelines, the Trainer, torch.export, torch.compile and accelerate.

Without these tests a pruned model could load and then fail in use: a pipeline that does not support
it, a fine-tuned copy that loads in other shapes, an offloaded weight that is lost.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from rfprune.model.checkpoint import load_pruned, save_pruned
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of, recorded_blocks
from rfprune.model.masks import full_masks
from tests.conftest import MODEL_TYPES

Tiny = Callable[..., Any]
Folder = Callable[..., Path]
ANY = torch.export.Dim.DYNAMIC
LOADS = ("with its own code", "with load_pruned")


@pytest.fixture(scope="module")
def pruned_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Tiny, tiny_tokenizer: Tiny
) -> Folder:
    """`pruned_folder(model_type)`: a pruned classifier whose second attention is empty.

    The first attention has lost one of four heads, the first FFN five of twelve neurons.
    """
    made: dict[str, Path] = {}

    def folder(model_type: str = "bert") -> Path:
        if model_type not in made:
            model = tiny_model(model_type)
            layout = layout_of(model)
            masks = full_masks(layout)
            masks[0][1], masks[1][:5], masks[2][:] = 0, 0, 0
            path = tmp_path_factory.mktemp(f"pruned-{model_type}")
            tokenizer = tiny_tokenizer(model_type)
            save_pruned(compact(model, layout, masks), layout, masks, path, tokenizer)
            made[model_type] = path
        return made[model_type]

    return folder


def load(folder: Path, how: str = LOADS[0], **options: Any) -> Any:
    if how == LOADS[1]:
        return load_pruned(folder, **options).eval()
    config = json.loads((folder / "config.json").read_text())
    (name,) = config["architectures"]
    auto_class = next(
        each
        for each, loaded in config["auto_map"].items()
        if loaded == f"modeling_rfprune.{name}" and each != "AutoModelForPreTraining"
    )
    load_with_code = getattr(transformers, auto_class).from_pretrained
    return load_with_code(folder, trust_remote_code=True, **options).eval()


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits  # type: ignore[no-any-return]


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What transformers logs."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield logged
    logger.removeHandler(handler)


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_text_classification_pipeline_knows_the_model(
    model_type: str, how: str, pruned_folder: Folder, tiny_tokenizer: Tiny, messages: list[str]
) -> None:
    model, tokenizer = load(pruned_folder(model_type), how), tiny_tokenizer(model_type)
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    sentences = ["a warm film .", "not a very good plot , and slow"]
    scores = classify(sentences, top_k=None)
    for sentence, found in zip(sentences, scores, strict=True):
        inputs = tokenizer(sentence, return_tensors="pt")
        expected = logits_of(model, inputs).softmax(-1)[0]
        by_label = {entry["label"]: entry["score"] for entry in found}
        assert by_label["LABEL_1"] == pytest.approx(float(expected[1]), abs=1e-5)
    assert scores[0] != scores[1]
    assert not [message for message in messages if "not supported" in message]


def test_a_pipeline_warns_of_an_unknown_class(
    pruned_folder: Folder, tiny_tokenizer: Tiny, messages: list[str]
) -> None:
    """Otherwise the test above could pass because nothing is ever logged."""
    model = load(pruned_folder())
    model.__class__ = type("Unknown", (type(model),), {})
    transformers.pipeline("text-classification", model=model, tokenizer=tiny_tokenizer())
    assert [message for message in messages if "'Unknown' is not supported" in message]


def make_trainer(model: Any, batch: dict[str, Tensor], folder: Path, steps: int) -> Any:
    rows = [
        {name: values[row] for name, values in batch.items()} | {"labels": torch.tensor(row % 2)}
        for row in range(len(batch["input_ids"]))
    ]
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_steps=2,
        seed=0,
    )
    return transformers.Trainer(model=model, args=settings, train_dataset=rows)


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet"])
def test_a_pruned_model_is_fine_tuned_on(
    model_type: str, how: str, pruned_folder: Folder, tiny_batch: Tiny, tmp_path: Path
) -> None:
    folder, batch = pruned_folder(model_type), tiny_batch(8)
    model = load(folder, how)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(model, batch, tmp_path / "run", 4)
    first_loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < first_loss
    moved = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    consumers = [block["consumer"] for block in recorded_blocks(model)]
    assert {f"{path}.bias" for path in consumers} <= moved, "also what an emptied sublayer keeps"
    trainer.save_model(str(tmp_path / "tuned"))
    expected = logits_of(model.eval(), batch)
    assert (expected - logits_of(load(folder, how), batch)).abs().max() > 1e-2
    for again in LOADS:
        tuned = load(tmp_path / "tuned", again)
        assert torch.equal(logits_of(tuned, batch), expected)
        assert {n: v.shape for n, v in tuned.state_dict().items()} == {
            name: value.shape for name, value in before.items()
        }


def test_training_goes_on_from_a_checkpoint(
    pruned_folder: Folder, tiny_batch: Tiny, tmp_path: Path
) -> None:
    batch = tiny_batch(8)
    whole = make_trainer(load(pruned_folder()), batch, tmp_path / "whole", 4)
    whole.train()
    resumed = make_trainer(load(pruned_folder()), batch, tmp_path / "resumed", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    torch.testing.assert_close(
        logits_of(resumed.model.eval(), batch), logits_of(whole.model.eval(), batch)
    )


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradients_are_those_of_recomputed_activations(
    model_type: str, pruned_folder: Folder, tiny_batch: Tiny
) -> None:
    """transformers cannot recompute the activations of MPNet, dense or pruned."""
    model, labels = load(pruned_folder(model_type)), torch.tensor([0, 1, 0, 1])
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        model.zero_grad()
        model(**tiny_batch(), labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet"])
def test_torch_export_takes_any_batch_and_length(
    model_type: str, pruned_folder: Folder, tiny_batch: Tiny
) -> None:
    """The other families share this code; all of them go through it on their way to ONNX."""
    model, batch = load(pruned_folder(model_type)), tiny_batch(3, 9)
    shapes = {name: {0: ANY, 1: ANY} for name in batch}
    with torch.no_grad():
        program = torch.export.export(model, (), batch, dynamic_shapes=shapes)
        for num_examples, length in ((1, 5), (3, 9), (6, 21)):
            other = tiny_batch(num_examples, length, seed=1)
            torch.testing.assert_close(program.module()(**other).logits, model(**other).logits)


@pytest.mark.parametrize("model_type", ["distilbert", "mpnet"])
def test_torch_compile_finds_one_graph(
    model_type: str, pruned_folder: Folder, tiny_batch: Tiny
) -> None:
    model, batch = load(pruned_folder(model_type)), tiny_batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, batch), logits_of(model, batch))


@pytest.mark.parametrize("how", LOADS)
def test_half_precision_and_autocast(how: str, pruned_folder: Folder, tiny_batch: Tiny) -> None:
    model, batch = load(pruned_folder(), how), tiny_batch()
    expected = logits_of(model, batch)
    half = logits_of(load(pruned_folder(), how, dtype=torch.float16), batch)
    assert half.dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = logits_of(model, batch)
    for found in (half, mixed):
        assert 0 < (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("place", ["cpu", "auto", "disk"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet"])
def test_a_device_map_places_the_weights(
    model_type: str, place: str, how: str, pruned_folder: Folder, tiny_batch: Tiny, tmp_path: Path
) -> None:
    """Also on the disk, where a weight without columns takes no room at all."""
    folder, batch = pruned_folder(model_type), tiny_batch()
    expected = logits_of(load(folder), batch)
    base = load(folder).base_model_prefix
    where: Any = {"cpu": {"": "cpu"}, "auto": "auto"}.get(place)
    if where is None:
        children = dict(load(folder).named_children())
        where = {name: "disk" if name == base else "cpu" for name in children}
    model = load(folder, how, device_map=where, offload_folder=str(tmp_path))
    assert any(p.device.type == "meta" for p in model.parameters()) == (place == "disk")
    assert torch.equal(logits_of(model, batch), expected)


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_transformers_alone_saves_it_again(
    model_type: str, how: str, pruned_folder: Folder, tiny_batch: Tiny, tmp_path: Path
) -> None:
    """Twice: the third folder has the weights, shapes and code of the first."""
    folder, batch = pruned_folder(model_type), tiny_batch()
    second, third = tmp_path / "second", tmp_path / "third"
    load(folder, how).save_pretrained(second)
    load(second, how).save_pretrained(third)
    code = (folder / "modeling_rfprune.py").read_text()
    assert (third / "modeling_rfprune.py").read_text() == code
    first, last = (json.loads((path / "config.json").read_text()) for path in (folder, third))
    for key in ("architectures", "auto_map", "rfprune"):
        assert last[key] == first[key]
    weights = load_file(folder / "model.safetensors")
    again = load_file(third / "model.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    expected = logits_of(load(folder), batch)
    assert torch.equal(logits_of(load(third, LOADS[0]), batch), expected)
    assert torch.equal(logits_of(load(third, LOADS[1]), batch), expected)


def test_the_modelling_file_opens_nothing_and_imports_two_packages() -> None:
    """A security review has little to read: no files, processes, network or eval."""
    from rfprune.model import modeling_rfprune

    text = Path(modeling_rfprune.__file__).read_text(encoding="utf-8")
    imports = {line for line in text.splitlines() if line.startswith(("import ", "from "))}
    packages = {line.split()[1].split(".")[0] for line in imports}
    assert packages == {"functools", "inspect", "torch", "transformers", "typing"}
    for word in ("open(", "eval(", "exec(", "subprocess", "socket", "urllib", " os.", "__import__"):
        assert word not in text.replace(".eval()", "")
