"""A checkpoint of transformers out of a quantised GGUF file, in float32.

python scripts/dequantise.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2-135m

Any architecture that transformers reads from GGUF will do. What quantisation has rounded away stays
lost: scores are those of the quantised model. Needs the package gguf.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("output", type=Path, help="the folder to write, which must not be there")
    options = parser.parse_args(argv)
    if not options.file.is_file() or options.output.exists():
        sys.stderr.write(
            f"dequantise: error: {options.file} must be a file, and {options.output} must not exist"
            " yet.\n"
        )
        return 2
    try:
        dequantise(options.file, options.output)
    except (ImportError, OSError, ValueError) as error:
        sys.stderr.write(f"dequantise: error: {options.file} cannot be read: {error}\n")
        return 2
    return 0


def dequantise(file: Path, output: Path) -> None:
    """Write model and tokenizer to a folder, once both have been read.

    Raises:
        ImportError, OSError, ValueError: the file is none that transformers reads, or gguf is
            missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(file.parent), file.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True)
    )
    for entry in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, entry):
            delattr(model.config, entry)
    model.float().save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    sys.exit(main())
