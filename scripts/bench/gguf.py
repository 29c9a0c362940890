"""Does llama.cpp compute the pruned model? Perplexity and greedy tokens of a GGUF file.

python -m scripts.bench.gguf --model smollm2-135m --data-dir text --constraint 0.9 0.8 0.7

Every model is scored on the same blocks of text by PyTorch and, from its float16 file, by stock
llama.cpp (llama-cpp-python). At the largest constraint a whole attention and a whole FFN are also
removed, which llama.cpp knows in no family of its own. Then both continue the same texts: how many
of the first tokens that PyTorch chooses does llama.cpp choose too?
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.cli.validation import check_exports
from rfprune.errors import check_installed
from rfprune.tasks.registry import LANGUAGE_MODELING
from scripts.bench import harness
from scripts.bench.harness import Conditions, say
from scripts.bench.models import greedy_tokens, load_checkpoint, num_examples, settings_of

NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 16, 16


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    names = "model data-dir constraint method samples seed eval-limit batch-size max-length"
    defaults = {"constraint": [0.9, 0.8, 0.7], "samples": 64, "batch_size": 8}
    options = harness.parser_of(__doc__, names, **defaults).parse_args(argv)
    options.task = LANGUAGE_MODELING
    check_exports(["gguf"])
    check_installed("llama.cpp", ["llama-cpp-python"], extra="llamacpp")
    own = ("model", "method", "seed", "eval_limit", "batch_size", "max_length")
    shared = harness.conditions_of(options, own) | {"requested_samples": options.samples}
    emptied = [(max(options.constraint), kind) for kind in ("head", "neuron")]
    wanted = [
        shared | {"constraint": ratio, "emptied": kind}
        for ratio, kind in [*((ratio, None) for ratio in options.constraint), *emptied]
    ]
    output = options.output or harness.default_output("gguf", shared["model"], options.method)
    return harness.complete(__file__, output, wanted, partial(_measure, options))


def _measure(options: argparse.Namespace, group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
    """Prune to each constraint, write the files, and run them."""
    from rfprune.export.gguf import export_gguf
    from rfprune.export.llama_cpp import LlamaCppModel
    from rfprune.pruning import prune_family
    from rfprune.tasks.evaluation import evaluate_model

    checkpoint = load_checkpoint(options)
    batches = checkpoint.batches(options.samples, options.seed)
    data = checkpoint.evaluation_set(options.eval_limit)
    settings = settings_of(method=options.method, seed=options.seed)
    ratios = list(dict.fromkeys(one["constraint"] for one in group))
    results = prune_family(checkpoint.model, batches, ratios, settings)
    for ratio, result in zip(ratios, results, strict=True):
        for conditions in (one for one in group if one["constraint"] == ratio):
            model, blocks = without_sublayer(result.model, conditions["emptied"])
            model = model.eval()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "model.gguf")
                export_gguf(model, checkpoint.loaded.tokenizer, path)
                runs = LlamaCppModel(path, model.config)
                scores = {
                    "pytorch": evaluate_model(model, data).score,
                    "llama_cpp": evaluate_model(runs, data).score,
                }
                agreed = agreed_tokens(model, runs, data.batches[0]["input_ids"])
                runs.close()
                num_bytes = path.stat().st_size
            say(f"{ratio} {conditions['emptied']}: {scores}, {agreed} of {NEW_TOKENS} tokens")
            yield {
                **conditions,
                "emptied_block": blocks,
                "settings": dataclasses.asdict(settings),
                "achieved": result.achieved,
                "samples": num_examples(batches),
                "evaluated_examples": data.num_examples,
                "perplexity": scores,
                "agreed_tokens": agreed,
                "new_tokens": NEW_TOKENS,
                "bytes": num_bytes,
                "warnings": list(result.warnings),
            }


def without_sublayer(model: Any, kind: str | None) -> tuple[Any, str | None]:
    """A model without the attention ("head") or the FFN ("neuron") of a layer in its upper half.

    Returns:
        The model, and the name of the block that was removed; the model itself for None.
    """
    from rfprune.model.compact import compact
    from rfprune.model.layout import layout_of
    from rfprune.model.masks import full_masks

    if kind is None:
        return model, None
    layout = layout_of(model)
    masks = full_masks(layout)
    place = next(
        number
        for number, block in enumerate(layout.blocks)
        if block.kind == kind and block.layer >= len(layout.layers) // 2
    )
    masks[place][:] = 0
    return compact(model, layout, masks), layout.blocks[place].name


def agreed_tokens(model: Any, other: Any, ids: Any) -> list[int]:
    """For each text, how many of the first tokens that a model adds another one would add too.

    Args:
        ids: the texts, (B, S); their first tokens are the prompts.
    """
    import torch

    prompts = ids[:NUM_PROMPTS, :PROMPT_TOKENS]
    added = greedy_tokens(model, prompts, NEW_TOKENS)
    chosen = other(input_ids=torch.cat([prompts, added], 1)[:, :-1])["logits"].argmax(-1)
    same = chosen[:, -NEW_TOKENS:] == added
    return [int(row.long().cumprod(0).sum()) for row in same]


if __name__ == "__main__":
    sys.exit(main())
