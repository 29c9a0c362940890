"""Make a tiny T5 that writes numbers in words, and its data: an example for task seq2seq.

python scripts/build_number_writer.py numbers
rfprune --model numbers/model --task seq2seq --data-dir numbers/data --constraint 0.8 \\
    --source-prefix "write in words: "

The model and its tokenizer are trained here, offline, in about a minute on one core.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfprune.cli.exit_codes import NOTHING_WRITTEN, script
from rfprune.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFIX = "write in words: "
SPLITS = {"train": 1000, "validation": 200}
_BATCH = 64
_LEARNING_RATE = 2e-3
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


@script(NOTHING_WRITTEN)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="gets model/ and data/; it must be new")
    parser.add_argument("--steps", type=int, default=500, help="training steps (default: 500)")
    options = parser.parse_args(argv)
    if options.folder.exists():
        raise UserError(f"'{options.folder}' already exists: give the name of a new folder")
    if options.steps < 1:
        raise UserError(f"--steps {options.steps} is too small: give 1 or more")
    model, tokenizer = _trained(options.steps)
    model.save_pretrained(options.folder / "model")
    tokenizer.save_pretrained(options.folder / "model")
    (options.folder / "data").mkdir()
    for split, size in SPLITS.items():
        draw = random.Random(split)
        rows = [(str(number), in_words(number)) for number in _numbers(draw, size)]
        with (options.folder / "data" / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("source", "target"), *rows])
    print(f"Wrote '{options.folder}/model' and '{options.folder}/data'")
    return 0


def in_words(number: int) -> str:
    """A number below a million in English words, without "and" and hyphens."""
    if number < 20:
        return _SMALL[number]
    for size, name in ((1000, " thousand"), (100, " hundred")):
        if number >= size:
            rest = f" {in_words(number % size)}" if number % size else ""
            return f"{in_words(number // size)}{name}{rest}"
    rest = f" {_SMALL[number % 10]}" if number % 10 else ""
    return _TENS[number // 10 - 2] + rest


def _numbers(draw: random.Random, size: int) -> list[int]:
    """Numbers of one to six digits, all lengths equally often."""
    return [draw.randrange(10 ** draw.randint(1, 6)) for _ in range(size)]


def _tokenizer() -> Any:
    """A BPE tokenizer, trained on numbers and their words; every digit is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    numbers = _numbers(random.Random("tokenizer"), 2000)
    texts = [text for one in numbers for text in (f"{PREFIX}{one}", in_words(one))]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def _trained(steps: int) -> tuple[Any, Any]:
    import torch
    from tqdm import trange
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    draw = random.Random("training")
    for _ in trange(steps, desc="training", disable=not sys.stderr.isatty()):
        numbers = _numbers(draw, _BATCH)
        sources = [f"{PREFIX}{one}" for one in numbers]
        batch = tokenizer(sources, padding=True, return_tensors="pt")
        targets = tokenizer([in_words(one) for one in numbers], padding=True, return_tensors="pt")
        labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.generation_config.max_new_tokens = 40
    return model.eval(), tokenizer


if __name__ == "__main__":
    sys.exit(main())
