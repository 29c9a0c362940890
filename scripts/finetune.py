"""Fine-tune an encoder, to have a checkpoint to prune; or recover a pruned model from its original.

python scripts/finetune.py --model ENCODER --task sst2 --data-dir DATA --output-dir CHECKPOINT
python scripts/finetune.py --model PRUNED --teacher ORIGINAL --task sst2 --output-dir RECOVERED

Both use transformers' Trainer. With --teacher the targets are the outputs of the original on the
texts of the training data (distillation), whose labels are not used. Any pruned or plain model of
any task is trained, language models too, and saved as it was loaded.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfprune.cli.exit_codes import script
from rfprune.cli.parser import add_flags
from rfprune.cli.validation import check_data, check_task
from rfprune.errors import UserError
from rfprune.settings import DataSettings
from rfprune.tasks.registry import CUSTOM, SEQ2SEQ, get_task, with_splits

if TYPE_CHECKING:
    from torch import Tensor

    from rfprune.checkpoints.loading import LoadedCheckpoint

RECOVERY_FILE = "recovery.json"
"""In the output of a recovery: the scores before and after, and how it was made."""

TEMPERATURE = 2.0
"""Softens the distributions of teacher and student, so that unlikely classes count more."""


@script("the checkpoint was not written.")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of an encoder, or of a model to recover")
    add("--task", required=True, help="such as mrpc, sst2, stsb, squad, custom")
    add("--teacher", help="recover --model from this original, on texts without labels")
    add("--output-dir", type=Path, required=True, help="new folder for the checkpoint")
    add_flags(parser, DataSettings, ("data_dir", "train_split", "validation_split"))
    add_flags(parser, DataSettings, ("text_columns", "label_column", "eval_limit"))
    add("--regression", action="store_true", help="for --task custom: labels are numbers")
    softness = f"with --teacher: of both distributions (default: {TEMPERATURE:g})"
    add("--temperature", type=float, help=softness)
    weight = "with --teacher: also match the hidden states of all layers, with this weight"
    add("--hidden-states", type=float, metavar="WEIGHT", help=weight)
    add("--epochs", type=float, default=3.0, help="default: 3")
    add("--max-steps", type=int, help="stop after this many batches (default: --epochs decides)")
    add("--learning-rate", type=float, default=3e-5, help="default: 3e-5")
    add("--batch-size", type=int, default=32, help="default: 32")
    add("--max-length", type=int, help="tokens per example (default: that of the task)")
    add("--max-train-samples", type=int, help="train on this many random examples (default: all)")
    bf16 = "compute in bfloat16 (autocast): several times faster where the processor supports it"
    add("--bf16", action="store_true", help=bf16)
    add("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args(arguments)
    check(options)
    if options.teacher is None:
        finetune(options)
    else:
        recover(options)
    return 0


def finetune(options: argparse.Namespace) -> None:
    """Write the fine-tuned checkpoint and print its scores on the validation data."""
    from transformers import Trainer, set_seed

    from rfprune.model.saved_tokenizer import save_tokenizer
    from rfprune.tasks.baseline import below_baseline
    from rfprune.tasks.calibration import sample
    from rfprune.tasks.encoding import encode
    from rfprune.tasks.evaluation import evaluate_model, prepare_evaluation
    from rfprune.tasks.splits import load_split

    task = choose_task(options)
    set_seed(options.seed)  # before the model: its head starts out random
    train = load_split(task, task.train_split, options.data_dir)
    if options.max_train_samples:
        train = sample(train, options.max_train_samples, options.seed)
    model, tokenizer = load(options.model, task)
    # before training: invalid validation data would otherwise be found an hour later
    length, limit = options.max_length, options.eval_limit
    prepared = prepare_evaluation(task, tokenizer, options.data_dir, max_length=length, limit=limit)
    trainer = Trainer(
        model=model,
        args=training_arguments(options, len(train)),
        train_dataset=encode(task, tokenizer, train, options.max_length),
        data_collator=partial(pad, tokenizer),
    )
    run_training(trainer, model)
    model.save_pretrained(options.output_dir)
    save_tokenizer(tokenizer, options.output_dir)
    evaluation = evaluate_model(model, prepared)
    for name, score in evaluation.scores.items():
        print(f"{task.name} {name}: {score:.2f}")
    if (reason := below_baseline(prepared, evaluation, model)) is not None:
        print(f"warning: The model's {reason}.", file=sys.stderr)


def choose_task(options: argparse.Namespace) -> Any:
    """A known task, or the one that the labels of your own data define."""
    if options.task != CUSTOM:
        return with_splits(get_task(options.task), options.train_split, options.validation_split)
    from rfprune.tasks.own_data import blank_custom_task, task_from_training_data

    blank = with_splits(blank_custom_task(), options.train_split, options.validation_split)
    columns = options.text_columns, options.label_column
    regression = options.regression
    return task_from_training_data(options.data_dir, *columns, regression=regression, task=blank)


def check(options: argparse.Namespace) -> None:
    """Raise a UserError for flags that are wrong, before anything is loaded."""
    check_data(options.task, options.data_dir, options.text_columns, options.label_column)
    if options.regression and options.task != CUSTOM:
        raise UserError("--regression belongs to --task custom: leave it out.")
    if options.regression and options.teacher is not None:
        raise UserError("--regression does nothing with --teacher, whose outputs are the targets.")
    if options.teacher is not None:
        check_task(options.task)
    for name in ("temperature", "hidden_states"):
        if getattr(options, name) is not None and options.teacher is None:
            raise UserError(f"{_flag(name)} does nothing without --teacher ORIGINAL: add it.")
    numbers = "epochs max_steps learning_rate batch_size max_train_samples temperature"
    for name in (*numbers.split(), "hidden_states"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{_flag(name)} {value}: it must be a number above 0.")
    if options.bf16:
        check_bfloat16()
    folder: Path = options.output_dir
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} already exists: name a new folder with --output-dir.")


def check_bfloat16() -> None:
    """Raise a UserError if the device that will be used cannot compute in bfloat16."""
    from transformers.utils import is_torch_bf16_gpu_available

    from rfprune.checkpoints.device import pick_device

    device = pick_device(None)
    if device.type != "cpu" and not is_torch_bf16_gpu_available():
        raise UserError(f"--bf16: this {device.type} device has no bfloat16: leave it out.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def load(name: str, task: Any) -> tuple[Any, Any]:
    """The encoder with a head for the task and its label names, and the tokenizer.

    A head with as many labels is kept and trained further; any other is replaced.
    """
    from transformers import (
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    from rfprune.checkpoints.padding import align_pad_token
    from rfprune.tasks.offline import cached_when_unreachable

    head: dict[str, Any] = {}
    model_class = AutoModelForQuestionAnswering
    if task.kind != "question-answering":
        model_class = AutoModelForSequenceClassification
        names = task.label_names or ("LABEL_0",)
        head = {
            "num_labels": task.num_labels,
            "id2label": dict(enumerate(names)),
            "label2id": {label: number for number, label in enumerate(names)},
            "problem_type": "single_label_classification" if task.label_names else "regression",
            "ignore_mismatched_sizes": True,  # the head of a checkpoint of another task
        }
    with cached_when_unreachable():
        try:
            model = model_class.from_pretrained(name, **head).float()
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise UserError(
                f"The encoder {name} cannot be loaded ({reason}): give a folder or a hub id of a "
                f"pretrained encoder with its tokenizer."
            ) from error
    align_pad_token(model, tokenizer, name)
    return model, tokenizer


def training_arguments(options: argparse.Namespace, num_examples: int) -> Any:
    """The usual recipe for BERT: AdamW, six per cent of warm-up, then linear decay."""
    import torch
    from transformers import TrainingArguments

    from rfprune.checkpoints.device import pick_device

    num_steps = max(1, int(options.epochs * num_examples / options.batch_size))
    num_steps = min(num_steps, options.max_steps or num_steps)
    return TrainingArguments(
        output_dir=str(options.output_dir),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        warmup_steps=num_steps * 6 // 100,
        weight_decay=0.01,
        bf16=options.bf16,
        use_cpu=pick_device(None).type == "cpu",
        seed=options.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=max(1, num_steps // 20),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def run_training(trainer: Any, model: Any) -> None:
    """Train the trainer's model, and then undo the autocast of its forward pass (--bf16), which
    would otherwise change the scores."""
    trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def recover(options: argparse.Namespace) -> None:
    """Train the model to compute what its teacher computes, save it, and print its scores."""
    import torch
    from rich.console import Console

    from rfprune.checkpoints import loading
    from rfprune.checkpoints.device import pick_device
    from rfprune.cli.console import collected_warnings
    from rfprune.tasks.evaluation import divergence, evaluate_model, prepare_evaluation

    check_not_the_same(options.model, options.teacher)
    with collected_warnings(Console(stderr=True, highlight=False), verbose=False):
        task = loading.resolve_task(
            options.task,
            options.model,
            data_dir=options.data_dir,
            text_columns=options.text_columns,
            label_column=options.label_column,
            train_split=options.train_split,
            validation_split=options.validation_split,
        )
        if task.kind == SEQ2SEQ:
            raise UserError(
                f"--task {SEQ2SEQ} is not trained here: use run_translation.py or "
                f"run_summarization.py of transformers, or give another task."
            )
        device = pick_device(None)
        student, teacher = (
            loading.load(name, task, device=device, dtype=torch.float32)
            for name in (options.model, options.teacher)
        )
        check_pair(student, teacher, hidden_states=options.hidden_states is not None)
        length = loading.resolve_max_length(student, task, options.max_length)
        data_dir = loading.resolve_data_dir(options.model, options.data_dir)
        train = unlabelled(task, student.tokenizer, data_dir, length, options)
        data = prepare_evaluation(
            task,
            student.tokenizer,
            data_dir,
            batch_size=options.batch_size,
            max_length=length,
            limit=options.eval_limit,
        )
        original = evaluate_model(teacher.model, data)
        before = evaluate_model(student.model, data, reference=teacher.model)
        config = copy.deepcopy(student.model.config)
        trainer = distillation_trainer(student, teacher.model, task.kind, train, options)
        start = time.perf_counter()
        run_training(trainer, student.model)
        seconds = time.perf_counter() - start
        student.model.config = config  # Trainer turns the cache of keys and values off
        student.model.to(device).eval()
        stored = rounded_to_stored(student)
        after = evaluate_model(student.model, data, reference=teacher.model)
    names = {"original": original, "before": before, "after": after}
    report = {
        "model": options.model,
        "teacher": options.teacher,
        "task": task.name,
        "metric_name": original.metric_name,
        "scores": {name: evaluation.score for name, evaluation in names.items()},
        "divergence": {
            name: divergence(original, evaluation)
            for name, evaluation in names.items()
            if name != "original"
        },
        "evaluated_examples": original.num_examples,
        "training_examples": len(train),
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "device": str(device),
        **{name: getattr(options, name) for name in ("batch_size", "learning_rate", "seed")},
        "max_length": length,
        "temperature": options.temperature or TEMPERATURE,
        "hidden_states": options.hidden_states,
    }
    save_recovered(student, stored, options.output_dir, report)
    scores = ", ".join(f"{score:.2f} {name}" for name, score in report["scores"].items())
    print(f"{task.name} {original.metric_name}: {scores}")
    print(f"{report['steps']} steps on {device} took {seconds / 60:.1f} minutes")


def check_not_the_same(model: str, teacher: str) -> None:
    """Raise a UserError if a model is its own teacher."""
    paths = [Path(name).expanduser() for name in (model, teacher)]
    if model == teacher or (all(path.exists() for path in paths) and paths[0].samefile(paths[1])):
        raise UserError(
            f"--teacher {teacher} is --model itself, and nothing could be learned: give the model "
            f"that was pruned."
        )


def check_pair(
    student: LoadedCheckpoint, teacher: LoadedCheckpoint, *, hidden_states: bool
) -> None:
    """Raise a UserError unless the outputs of both models can be compared."""
    ours, theirs = student.model.config, teacher.model.config
    if getattr(ours, "id2label", None) != getattr(theirs, "id2label", None):
        raise UserError(
            f"The labels of --model {student.source} are {_labels(ours)}, and those of --teacher "
            f"{teacher.source} are {_labels(theirs)}: give the model that was pruned."
        )
    if hasattr(student.tokenizer, "get_vocab"):
        sizes = [one.model.get_input_embeddings().num_embeddings for one in (student, teacher)]
        vocabularies = [one.tokenizer.get_vocab() for one in (student, teacher)]
        if sizes[0] != sizes[1] or vocabularies[0] != vocabularies[1]:
            raise UserError(
                f"--model {student.source} and --teacher {teacher.source} have other vocabularies "
                f"({sizes[0]} and {sizes[1]} tokens): both must read the same token ids, so give "
                f"the model that was pruned, and trim the vocabulary afterwards."
            )
    if hidden_states and _shape_of_states(student.model) != _shape_of_states(teacher.model):
        raise UserError(
            f"--hidden-states needs equally many layers and features, but --model has "
            f"{_shape_of_states(student.model)} and --teacher {_shape_of_states(teacher.model)} "
            f"(layers, features): leave it out."
        )


def _labels(config: Any) -> str:
    names = list((getattr(config, "id2label", None) or {}).values())
    return ", ".join(map(str, names[:4])) + ", ..." * (len(names) > 4)


def _shape_of_states(model: Any) -> tuple[int, int]:
    """Number of layers, and width of the hidden states."""
    from rfprune.model.layout import layout_of

    return len(layout_of(model).layers), int(model.config.hidden_size)


def unlabelled(
    task: Any, tokenizer: Any, data_dir: Path | None, length: int, options: argparse.Namespace
) -> Any:
    """The inputs of the training data, a `datasets.Dataset` without its labels, if it has any."""
    from rfprune.tasks.batching import LABELS
    from rfprune.tasks.calibration import sample
    from rfprune.tasks.encoding import encode
    from rfprune.tasks.splits import load_split

    rows = load_split(task, task.train_split, data_dir, labels_required=False)
    number, is_text = options.max_train_samples, task.kind == "language-modeling"
    if number is not None and not is_text:  # running text is split into blocks first
        rows = sample(rows, number, options.seed)
    encoded = encode(task, tokenizer, rows, length)
    if number is not None and is_text:
        encoded = sample(encoded, number, options.seed)
    return encoded.remove_columns([name for name in LABELS if name in encoded.column_names])


def distillation_trainer(
    student: LoadedCheckpoint,
    teacher: Any,
    kind: str,
    train: Any,
    options: argparse.Namespace,
) -> Any:
    """A Trainer whose loss is the distance of the student from the teacher on unlabelled inputs.

    The student runs without dropout: the targets are those of the teacher without dropout.
    """
    from transformers import Trainer, set_seed

    from rfprune.embeddings import pooling_of

    set_seed(options.seed)
    accepted = {one: signature(one.forward).parameters for one in (student.model, teacher)}
    temperature = options.temperature or TEMPERATURE
    pooling = pooling_of(student.model.config)
    weight = options.hidden_states or 0.0

    def outputs_of(model: Any, unwrapped: Any, inputs: Mapping[str, Any]) -> Any:
        known = accepted[unwrapped]
        more = {"use_cache": False, "output_hidden_states": weight > 0}
        given = {
            **inputs,
            **{name: value for name, value in more.items() if value or name in known},
        }
        return model(**{name: given[name] for name in given if name in known or name in more})

    class DistillationTrainer(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            import torch

            model.eval()
            with torch.no_grad():
                targets = outputs_of(teacher, teacher, inputs)
            outputs = outputs_of(model, student.model, inputs)
            mask = inputs.get("attention_mask")
            loss = distillation_loss(outputs, targets, mask, kind, temperature, pooling)
            return loss + weight * hidden_state_loss(outputs, targets, mask) if weight else loss

    arguments = training_arguments(options, len(train))
    arguments.remove_unused_columns = False
    arguments.label_names = []
    teacher.to(arguments.device).requires_grad_(False)
    return DistillationTrainer(
        model=student.model,
        args=arguments,
        train_dataset=train,
        data_collator=partial(pad, student.tokenizer),
    )


def distillation_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    mask: Tensor | None,
    kind: str,
    temperature: float = 1.0,
    pooling: str = "mean",
) -> Tensor:
    """Distance of a student's outputs from the teacher's, a mean over examples or tokens.

    The KL divergence of the softened distributions times the square of the temperature, by which
    gradients keep their size (Hinton et al. 2015, arXiv 1503.02531, section 2). Half the squared
    difference for one output (regression) and for embeddings, as in `rfprune.tasks.divergence`.

    Args:
        student: logits (B, C), or (B, S) at the start and end of answers, or (B, S, C); hidden
            states (B, S, d) of an embedder.
        teacher: the same of the teacher.
        mask: (B, S), 1 at tokens; None for images.
        kind: of the task.
        temperature: divides the logits.
        pooling: of embeddings.
    """
    import torch

    from rfprune.embeddings import embed

    if kind == "similarity":
        assert mask is not None
        first, second = (
            embed(one["last_hidden_state"], mask, pooling) for one in (student, teacher)
        )
        return (first - second).square().sum(-1).mean() / 2
    total = torch.zeros(())
    for name in (name for name in teacher if name.endswith("logits")):
        first, second = student[name].float(), teacher[name].float()
        if kind == "regression":
            return (first - second).square().mean() / 2
        if kind in ("language-modeling", "token-classification") and mask is not None:
            first, second = first[mask.bool()], second[mask.bool()]
        if kind == "multi-label":  # every label is a choice between its logit and 0
            first, second = (
                torch.stack([one, 0 * one], -1).flatten(0, 1) for one in (first, second)
            )
        if kind == "question-answering":
            assert mask is not None
            lowest = torch.finfo(first.dtype).min
            first, second = (one.masked_fill(~mask.bool(), lowest) for one in (first, second))
        log_p, log_q = ((one / temperature).log_softmax(-1) for one in (second, first))
        rows = len(log_p) if kind != "multi-label" else len(teacher[name])
        distance = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / rows
        total = total.to(distance) + temperature**2 * distance
    return total


def hidden_state_loss(
    student: Mapping[str, Any], teacher: Mapping[str, Any], mask: Tensor | None
) -> Tensor:
    """Squared difference of the hidden states at tokens over their square, a mean over layers.

    Args:
        student: outputs with hidden states, (B, S, d) after the embeddings and after every layer.
        teacher: the same of the teacher.
        mask: (B, S), 1 at tokens; None for images, and ignored for a stack of another length.
    """
    import torch

    losses = []
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    for name in (name for name in names if teacher.get(name) is not None):
        for ours, theirs in zip(student[name][1:], teacher[name][1:], strict=True):
            if mask is not None and mask.shape == ours.shape[:2]:
                ours, theirs = ours[mask.bool()], theirs[mask.bool()]
            losses.append((ours - theirs).square().sum() / theirs.square().sum())
    return torch.stack(losses).mean()


def rounded_to_stored(student: LoadedCheckpoint) -> Any:
    """The dtype that the checkpoint was stored in; its weights are rounded to it."""
    from rfprune.checkpoints.precision import round_to_stored_dtype, stored_dtype

    return round_to_stored_dtype(stored_dtype(student.source), student.model)


def save_recovered(
    student: LoadedCheckpoint, dtype: Any, folder: Path, report: Mapping[str, Any]
) -> None:
    """Write the model as it was loaded, pruned or plain, with all that came along with it."""
    from rfprune.checkpoints.companion_files import write_companion_files
    from rfprune.model.checkpoint import MASKS_FILE, stored_state
    from rfprune.model.saved_tokenizer import save_tokenizer
    from rfprune.model.staging import staged

    with staged(folder, overwrite=False) as temporary:
        student.model.save_pretrained(temporary, state_dict=stored_state(student.model, dtype))
        save_tokenizer(student.tokenizer, temporary)
        write_companion_files(student.files, temporary)
        masks = Path(student.source) / MASKS_FILE
        if masks.is_file():
            (temporary / MASKS_FILE).parent.mkdir(exist_ok=True)
            shutil.copyfile(masks, temporary / MASKS_FILE)
        (temporary / RECOVERY_FILE).write_text(
            json.dumps(report, indent=2) + "\n", encoding="utf-8"
        )


def pad(tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of the encoded data as one padded batch of (B, S) tensors."""
    from rfprune.tasks.batching import collate

    return collate({name: [row[name] for row in rows] for name in rows[0]}, tokenizer)


if __name__ == "__main__":
    sys.exit(main())
