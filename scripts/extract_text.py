"""Running text out of a dataset: the distinct texts of one column, a blank line between them.

python scripts/extract_text.py data/squad text --column context
python -m rfprune.main --model CHECKPOINT --task language-modeling --data-dir text ...

No text of the validation split is in the training split. Writes OUTPUT/train.txt and
OUTPUT/validation.txt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

SPLITS = ("validation", "train")  # in this order: what is held out is taken first


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error."""
    options = _parser().parse_args(argv)
    try:
        extract(options.dataset, options.column, options.output)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"extract_text: error: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("dataset", type=Path, help="a folder with train.parquet and validation.parquet")
    add("output", type=Path, help="the folder that gets train.txt and validation.txt")
    add("--column", default="text", help="that holds the texts (default: text)")
    return parser


def extract(dataset: Path, column: str, output: Path) -> None:
    """Write the texts of both splits; OSError or ValueError where they cannot be read."""
    import pandas as pd

    output.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split in SPLITS:
        rows = pd.read_parquet(dataset / f"{split}.parquet", columns=[column])[column]
        texts = [text for text in dict.fromkeys(str(row).strip() for row in rows) if text]
        new = [text for text in texts if text not in seen]
        seen.update(new)
        (output / f"{split}.txt").write_text("\n\n".join(new) + "\n", encoding="utf-8")
        print(f"{split}: {len(new)} texts, {sum(map(len, new))} characters")


if __name__ == "__main__":
    sys.exit(main())
