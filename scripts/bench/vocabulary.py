"""Trimmed vocabularies: bytes, score, and how held-out texts are encoded.

python -m scripts.bench.vocabulary --model path/to/embedder --task similarity \\
    --data-dir DIR --texts DIR/stsb/train.parquet
python -m scripts.bench.vocabulary --model unigram --texts train.txt --held-out validation.txt

The first form runs the command with --vocabulary alone and copies from its report. With --task
language-modeling the first blocks of --held-out are scored, without the command. `unigram` is the
shape of a small multilingual embedder with random weights and a Unigram tokenizer of 250,002
pieces, made of the substrings of the texts and of random characters; instead of a score, its line
has the largest difference of the hidden states.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.errors import UserError
from rfprune.tasks.registry import LANGUAGE_MODELING
from rfprune.vocabulary.texts import count_tokens_of_files, read_text
from rfprune.vocabulary.trim import TrimmedVocabulary, trim_to_counts
from scripts.bench import harness
from scripts.bench.harness import Conditions, machine

UNIGRAM = "unigram"
PIECES = 250_000
"""Of the random Unigram, besides `<s>` and `<mask>` at its ends, as in XLM-RoBERTa."""

_COMPARED = 64  # texts
_BLOCKS, _BLOCK_TOKENS = 8, 256  # of a language model
_CHARACTERS = 6  # a token, at most, on average


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    without_data = options.model == UNIGRAM or options.task == LANGUAGE_MODELING
    if without_data and options.held_out is None:
        raise UserError(
            f"--model {UNIGRAM} and --task {LANGUAGE_MODELING} need --held-out FILE, a text that "
            "is not among --texts."
        )
    shared = {
        **harness.conditions_of(options, ["model", "task", "samples", "eval_limit"]),
        "texts": ", ".join(f"{path.parent.name}/{path.name}" for path in options.texts),
    }
    wanted = [shared | one for one in harness.each_combination(min_count=options.min_count)]
    output = options.output or harness.default_output("vocabulary", shared["model"])
    return harness.complete(__file__, output, wanted, partial(_measure, options))


def _parser() -> argparse.ArgumentParser:
    names = "model task data-dir samples eval-limit"
    parser = harness.parser_of(__doc__, names, model=harness.REQUIRED, task=None, samples=64)
    add = parser.add_argument
    add("--texts", nargs="+", type=Path, required=True, metavar="FILE", help="the vocabulary's")
    add("--held-out", type=Path, metavar="FILE", help="a text for models without a task")
    counts = harness.count("--min-count")
    add("--min-count", nargs="+", type=counts, default=[1], metavar="N", help="default: 1")
    return parser


def _measure(options: argparse.Namespace, group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
    for conditions in group:
        if options.model == UNIGRAM:
            found = _random_unigram(options, conditions["min_count"])
        elif options.task == LANGUAGE_MODELING:
            found = _language_model(options, conditions["min_count"])
        else:
            found = _by_command(options, conditions["min_count"])
        yield conditions | found | {"machine": machine("cpu")}


def _by_command(options: argparse.Namespace, min_count: int) -> dict[str, Any]:
    from transformers import AutoModel, AutoTokenizer

    from rfprune.main import main as rfprune

    model, tokenizer = (one.from_pretrained(options.model) for one in (AutoModel, AutoTokenizer))
    flags = ["--model", options.model, "--task", options.task, "--device", "cpu", "--quiet"]
    flags += ["--samples", str(options.samples), "--vocabulary", *map(str, options.texts)]
    flags += ["--vocabulary-min-count", str(min_count)]
    if options.data_dir is not None:
        flags += ["--data-dir", str(options.data_dir)]
    if options.eval_limit is not None:
        flags += ["--eval-limit", str(options.eval_limit)]
    with tempfile.TemporaryDirectory(prefix="vocabulary-") as name:
        folder = Path(name) / "output"
        if rfprune([*flags, "--output-dir", str(folder)]):
            raise harness.NotMeasured(f"rfprune {' '.join(flags)}")
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    tokens = report["vocabulary"]
    return {
        "tokens": [tokens["original"], tokens["pruned"]],
        "params": [report[one]["params"] for one in ("original", "pruned")],
        "bytes": [report[one]["bytes"] for one in ("original", "pruned")],
        "metric_name": report["metric_name"],
        "scores": [report[one]["score"] for one in ("original", "pruned")],
        "examples": report["evaluated_examples"],
        "divergence": report["divergence"],
        "held_out": tokens["held_out"],
        "cpu_seconds": _trimmed(model, tokenizer, options.texts, min_count)[1],
    }


def _trimmed(
    model: Any, tokenizer: Any, texts: Sequence[Path], min_count: int
) -> tuple[TrimmedVocabulary, float]:
    """The trimmed vocabulary, and the processor time of counting tokens and trimming."""
    start = time.process_time()
    counts = count_tokens_of_files(tokenizer, texts)
    trimmed = trim_to_counts(model, tokenizer, counts, min_count=min_count)
    return trimmed, time.process_time() - start


def _language_model(options: argparse.Namespace, min_count: int) -> dict[str, Any]:
    """The perplexity of the first blocks of the held-out text, per token of the original
    tokenizer."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rfprune.cost.memory import total_bytes
    from rfprune.cost.params import total_params
    from rfprune.tasks.language_modeling import encode_blocks, token_likelihoods

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    trimmed, seconds = _trimmed(model, tokenizer, options.texts, min_count)
    number = options.eval_limit or _BLOCKS
    text = read_text(options.held_out)
    text = text[: number * _BLOCK_TOKENS * _CHARACTERS]
    changes = trimmed.compare([line for line in text.splitlines() if line])
    scores = []
    for one, own in ((model, tokenizer), (trimmed.model, trimmed.tokenizer)):
        blocks = torch.tensor(encode_blocks(own, [text], _BLOCK_TOKENS)["input_ids"][:number])
        batches = [{"input_ids": block[None]} for block in blocks]
        rows = [np.array([row]) for row in range(len(batches))]
        scores.append(float(token_likelihoods(one, batches, rows)[0].mean()))
    more = changes.tokens_after / changes.tokens_before
    return {
        "tokens": [trimmed.num_original, len(trimmed.old_ids)],
        "params": [total_params(model), total_params(trimmed.model)],
        "bytes": [total_bytes(model), total_bytes(trimmed.model)],
        "metric_name": "perplexity",
        "scores": [math.exp(-scores[0]), math.exp(-scores[1] * more)],
        "examples": number,
        "held_out": vars(changes),
        "cpu_seconds": seconds,
    }


def _random_unigram(options: argparse.Namespace, min_count: int) -> dict[str, Any]:
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel

    from rfprune.cost.memory import total_bytes
    from rfprune.cost.params import total_params

    lines = [line for path in options.texts for line in read_text(path).splitlines() if line]
    tokenizer = unigram_tokenizer(lines, PIECES)
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=514,
    )
    model = XLMRobertaModel(config, add_pooling_layer=False).eval()
    trimmed, seconds = _trimmed(model, tokenizer, options.texts, min_count)
    difference = 0.0
    for line in lines[:_COMPARED]:
        ids = torch.tensor([tokenizer(line, truncation=True, max_length=128)["input_ids"]])
        with torch.inference_mode():
            both = model(ids)[0], trimmed.model(trimmed.new_ids(ids))[0]
        difference = max(difference, float((both[0] - both[1]).abs().max()))
    held_out = [line for line in read_text(options.held_out).splitlines() if line]
    return {
        "tokens": [len(tokenizer), len(trimmed.old_ids)],
        "params": [total_params(model), total_params(trimmed.model)],
        "bytes": [total_bytes(model), total_bytes(trimmed.model)],
        "difference": difference,
        "examples": _COMPARED,
        "held_out": vars(trimmed.compare(held_out)),
        "cpu_seconds": seconds,
    }


def unigram_tokenizer(lines: Sequence[str], size: int) -> Any:
    """A Unigram of the most frequent substrings of the words of a text, and random characters.

    Args:
        size: pieces, besides `<s>` at the beginning and `<mask>` at the end.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = collections.Counter("▁" + word for line in lines for word in line.split())
    pieces: collections.Counter[str] = collections.Counter()
    for word, number in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + 12, len(word)) + 1):
                pieces[word[start:end]] += number
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    chosen = [one for one, _ in pieces.most_common(size // 2)]
    draw, known = random.Random(0), {*chosen, *special}
    while len(chosen) < size - len(special) + 1:  # other scripts, which these texts do not use
        piece = "".join(chr(draw.randint(0x400, 0x9FFF)) for _ in range(draw.randint(1, 6)))
        if piece not in known:
            known.add(piece)
            chosen.append(piece)
    total = sum(pieces.values())
    scored = [(one, math.log(max(pieces[one], 1) / total)) for one in chosen]
    vocabulary = [*((token, 0.0) for token in special), *scored, ("<mask>", 0.0)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens([*special, "<mask>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


if __name__ == "__main__":
    sys.exit(main())
