"""Convert a quantised GGUF file into a float32 checkpoint of transformers.

python scripts/dequantise.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2-135m

Works for every architecture that transformers reads from GGUF. The rounding of the quantisation
stays: scores are those of the quantised model. Needs the package gguf.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rfprune.cli.exit_codes import NOTHING_WRITTEN, script
from rfprune.errors import UserError, error_summary


@script(NOTHING_WRITTEN)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("output", type=Path, help="a new folder")
    options = parser.parse_args(argv)
    if not options.file.is_file():
        raise UserError(f"{options.file} does not exist: name a GGUF file.")
    if options.output.exists():
        raise UserError(f"{options.output} already exists: name a new folder.")
    dequantise(options.file, options.output)
    return 0


def dequantise(file: Path, output: Path) -> None:
    """Write model and tokenizer to a folder, once both have been read.

    Raises:
        UserError: transformers cannot read the file, or gguf is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(file.parent), file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True)
        )
    except (ImportError, OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({error_summary(error)}): give a GGUF file of a model that "
            f"transformers supports, and install gguf."
        ) from error
    for entry in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, entry):
            delattr(model.config, entry)
    model.float().save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    sys.exit(main())
