"""Extract running text from a dataset: the distinct texts of one column, blank lines between them.

python scripts/extract_text.py data/squad text --column context
python -m rfprune.main --model CHECKPOINT --task language-modeling --data-dir text ...

Writes OUTPUT/train.txt and OUTPUT/validation.txt. No text is in both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rfprune.cli.exit_codes import script
from rfprune.errors import UserError

SPLITS = ("validation", "train")
"""In this order: texts of both splits are held out."""


@script("the output may be incomplete.")
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("dataset", type=Path, help="a folder with train.parquet and validation.parquet")
    add("output", type=Path, help="the folder for train.txt and validation.txt")
    add("--column", default="text", help="the column of the texts (default: text)")
    options = parser.parse_args(argv)
    extract(options.dataset, options.column, options.output)
    return 0


def extract(dataset: Path, column: str, output: Path) -> None:
    """Write the texts of both splits.

    Raises:
        UserError: a file or the column is missing, or the output cannot be written.
    """
    import pandas as pd

    seen: set[str] = set()
    for split in SPLITS:
        path = dataset / f"{split}.parquet"
        try:
            rows = pd.read_parquet(path, columns=[column])[column]
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} with a column '{column}' cannot be read ({error}): give the folder of a "
                f"dataset, and --column."
            ) from error
        texts = [text for text in dict.fromkeys(str(row).strip() for row in rows) if text]
        new = [text for text in texts if text not in seen]
        seen.update(new)
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / f"{split}.txt").write_text("\n\n".join(new) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{output} cannot be written ({error}): name another folder."
            ) from error
        print(f"{split}: {len(new)} texts, {sum(map(len, new))} characters")


if __name__ == "__main__":
    sys.exit(main())
