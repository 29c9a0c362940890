"""Fine-tune an encoder on a task with transformers' Trainer, to have a checkpoint to prune.

python scripts/finetune.py --model ENCODER --task sst2 --data-dir DATA --output-dir CHECKPOINT
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rfprune.cli.exit_codes import script
from rfprune.cli.parser import add_flags
from rfprune.cli.validation import check_data
from rfprune.errors import UserError
from rfprune.settings import DataSettings
from rfprune.tasks.registry import CUSTOM, get_task, with_splits


@script("the checkpoint was not written.")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a pretrained encoder")
    add("--task", required=True, help="such as mrpc, sst2, stsb, squad, custom")
    add("--output-dir", type=Path, required=True, help="new folder for the checkpoint")
    add_flags(parser, DataSettings, ("data_dir", "train_split", "validation_split"))
    add_flags(parser, DataSettings, ("text_columns", "label_column"))
    add("--regression", action="store_true", help="for --task custom: labels are numbers")
    add("--epochs", type=float, default=3.0, help="default: 3")
    add("--learning-rate", type=float, default=3e-5, help="default: 3e-5")
    add("--batch-size", type=int, default=32, help="default: 32")
    add("--max-length", type=int, help="tokens per example (default: that of the task)")
    add("--max-train-samples", type=int, help="train on this many random examples (default: all)")
    add("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args(arguments)
    finetune(options)
    return 0


def finetune(options: argparse.Namespace) -> None:
    """Write the fine-tuned checkpoint and print its scores on the validation data."""
    check(options)
    from transformers import Trainer, set_seed

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
    prepared = prepare_evaluation(task, tokenizer, options.data_dir, max_length=options.max_length)
    Trainer(
        model=model,
        args=training_arguments(options, len(train)),
        train_dataset=encode(task, tokenizer, train, options.max_length),
        data_collator=partial(pad, tokenizer),
    ).train()
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
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
    for name in ("epochs", "learning_rate", "batch_size", "max_train_samples"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be a number above 0.")
    folder: Path = options.output_dir
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already: name a new folder with --output-dir.")


def load(name: str, task: Any) -> tuple[Any, Any]:
    """The encoder with a new head for the task and its label names, and the tokenizer."""
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

    num_steps = max(1, int(options.epochs * num_examples / options.batch_size))
    return TrainingArguments(
        output_dir=str(options.output_dir),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        warmup_steps=num_steps * 6 // 100,
        weight_decay=0.01,
        seed=options.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=max(1, num_steps // 20),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def pad(tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of the encoded data as one padded batch of (B, S) tensors."""
    from rfprune.tasks.batching import collate

    return collate({name: [row[name] for row in rows] for name in rows[0]}, tokenizer)


if __name__ == "__main__":
    sys.exit(main())
