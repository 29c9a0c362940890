"""Make rfprune/demo/ from a fine-tuned BERT checkpoint and SST-2, by trimming its vocabulary.

The pieces that the kept sentences use are kept, so these are tokenised as before. All single
characters (and ##characters) are kept too, so other words are split into more pieces, never into
[UNK]: WordPiece takes the longest piece that it knows.

    python scripts/build_demo.py --source CHECKPOINT --data DATA_DIR
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rfprune.cli.exit_codes import script
from rfprune.demo import DEMO_TASK, demo_data_dir, demo_path
from rfprune.errors import UserError
from rfprune.tasks.calibration import sample
from rfprune.tasks.evaluation import Evaluation, evaluate_model, prepare_evaluation
from rfprune.tasks.registry import get_task
from rfprune.tasks.splits import load_split

TRAIN_ROWS = 3000
SEED = 0
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
MAX_MEGABYTES = 30
README = """\
# The embedded demo

`python -m rfprune.main --model demo --task sst2 --constraint 0.5` prunes the model in this folder.
`scripts/build_demo.py` writes it; do not edit it by hand.

**Model.** BERT with 6 layers, 12 heads, hidden size 384 and 1536 FFN neurons: the encoder
all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0; from Microsoft's MiniLM, MIT), fine-tuned on
44,800 sentences of SST-2. The weights are stored in half precision and run in float32. The
vocabulary is cut from {source_tokens} to {kept_tokens} pieces: those of the sentences below, and
all single characters. The tokenizer splits these sentences exactly as the full one does, and other
text into more pieces. The weights are under the Apache License 2.0, like the rest of this
repository.

**Data.** `data/sst2/`: the whole validation split (872 sentences) and {train_rows} of the 67,349 of
the training split (seed {seed}), with the columns of the hub's `nyu-mll/glue`. The Stanford
Sentiment Treebank, Socher et al., "Recursive Deep Models for Semantic Compositionality Over a
Sentiment Treebank", EMNLP 2013; sentences from movie reviews at rottentomatoes.com (Pang and Lee
2005). It states no licence and is passed on here for research, as GLUE does: cite the authors.

**Score before pruning** on the validation split: accuracy {score:.2f}. The full checkpoint:
{source_score:.2f}; largest difference between logits: {difference:.1g}.

| file | bytes | sha256 |
|---|---:|---|
{files}
"""


@script("the demo is incomplete.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="fine-tuned BERT checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds sst2/")
    parser.add_argument("--output-dir", type=Path, default=demo_path())
    arguments = parser.parse_args(argv)
    build(arguments.source, arguments.data, arguments.output_dir)
    return 0


def build(source: Path, data_dir: Path, output_dir: Path) -> None:
    """Write checkpoint, data and README.md into `output_dir`."""
    task = get_task(DEMO_TASK)
    output_dir.mkdir(parents=True, exist_ok=True)
    train = sample(load_split(task, task.train_split, data_dir), TRAIN_ROWS, SEED)
    validation = load_split(task, "validation", data_dir)
    output_data_dir = output_dir / demo_data_dir().relative_to(demo_path())
    save_data(train, output_data_dir / task.name / "train.parquet")
    save_data(validation, output_data_dir / task.name / "validation.parquet")
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    kept = kept_tokens(source, tokenizer, [*train["sentence"], *validation["sentence"]])
    save_checkpoint(source, output_dir, tokenizer, kept)
    full, small = (evaluate(folder, output_data_dir) for folder in (source, output_dir))
    text = README.format(
        source_tokens=len(tokenizer["model"]["vocab"]),
        kept_tokens=len(kept),
        train_rows=len(train),
        seed=SEED,
        score=small.score,
        source_score=full.score,
        difference=np.abs(full.logits[0] - small.logits[0]).max(),
        files="\n".join(file_rows(output_dir)),
    )
    (output_dir / "README.md").write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file()) / 1e6
    print(f"{output_dir}: {size:.1f} MB, {len(kept)} tokens, accuracy {small.score:.2f}")
    if size > MAX_MEGABYTES:
        raise UserError(f"The demo has {size:.1f} MB, more than {MAX_MEGABYTES}: keep less data.")


def save_data(dataset: Dataset, path: Path) -> None:
    """Write sentence, label and idx as parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = dataset.select_columns(["sentence", "label", "idx"]).with_format("arrow")[:]
    parquet.write_table(table, path, compression="zstd")


def kept_tokens(source: Path, tokenizer: dict[str, Any], sentences: list[str]) -> list[str]:
    """Tokens to keep, in the order of their ids: special, single characters, and those used."""
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    encoded = AutoTokenizer.from_pretrained(source)(sentences, truncation=False)["input_ids"]
    used = {number for numbers in encoded for number in numbers}
    special = {token["content"] for token in tokenizer["added_tokens"]}
    return sorted(
        (
            token
            for token, number in vocabulary.items()
            if token in special or number in used or len(token.removeprefix("##")) == 1
        ),
        key=vocabulary.__getitem__,
    )


def save_checkpoint(
    source: Path, output_dir: Path, tokenizer: dict[str, Any], kept: list[str]
) -> None:
    """Write the checkpoint with the kept tokens alone, numbered anew in the same order."""
    old_ids = [tokenizer["model"]["vocab"][token] for token in kept]
    new_id = {old: new for new, old in enumerate(old_ids)}
    weights = load_file(source / "model.safetensors")
    weights[EMBEDDINGS] = weights[EMBEDDINGS][old_ids].clone()
    save_file(weights, output_dir / "model.safetensors", metadata={"format": "pt"})
    (output_dir / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"vocab_size": len(kept), "pad_token_id": new_id[config["pad_token_id"]]}
    _write_json(config, output_dir / "config.json")
    trimmed = json.loads(json.dumps(tokenizer))
    trimmed["truncation"] = None
    trimmed["model"]["vocab"] = {token: number for number, token in enumerate(kept)}
    for token in trimmed["added_tokens"]:
        token["id"] = new_id[token["id"]]
    for token in trimmed["post_processor"]["special_tokens"].values():
        token["ids"] = [new_id[number] for number in token["ids"]]
    _write_json(trimmed, output_dir / "tokenizer.json")
    shutil.copyfile(source / "tokenizer_config.json", output_dir / "tokenizer_config.json")


def evaluate(checkpoint: Path, data_dir: Path) -> Evaluation:
    """Score a checkpoint on the validation split."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).float().eval()
    prepared = prepare_evaluation(get_task(DEMO_TASK), tokenizer, data_dir)
    return evaluate_model(model, prepared)


def file_rows(folder: Path) -> list[str]:
    """A table row for each file of the demo that is not text for people or code."""
    names = ("*.json", "*.safetensors", "*.parquet")
    paths = sorted(path for pattern in names for path in folder.rglob(pattern))
    return [
        f"| `{path.relative_to(folder)}` | {path.stat().st_size:,} "
        f"| `{hashlib.sha256(path.read_bytes()).hexdigest()}` |"
        for path in paths
    ]


def _write_json(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
