"""Suggest the row of `rfprune/families/architectures.py` that a model type needs.

    python scripts/inspect_architecture.py deberta-v2
    python scripts/inspect_architecture.py path/to/a/folder/with/config.json

A model type needs no download; of a folder or a hub id only config.json is read. The row is a guess
from the sizes, names and order of the modules. To check it, add the row and a tiny configuration in
tests/conftest.py, and run the contract suite:

    python -m pytest tests/model/test_contract.py -k MODEL_TYPE
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rfprune.cli.exit_codes import script
from rfprune.errors import UserError
from rfprune.families.architectures import ARCHITECTURES
from rfprune.families.suggest import as_text, suggest


@script("no row was printed.")
def main(arguments: list[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model type of transformers, a folder, or a hub id")
    model = parser.parse_args(arguments).model
    config = config_of(model)
    text = as_text(config.model_type, suggest(config))
    known = config.model_type in ARCHITECTURES
    print(f"# {'already in' if known else 'add to'} rfprune/families/architectures.py")
    print(text)
    return 0


def config_of(model: str) -> Any:
    """The default configuration of a model type, or that of a checkpoint.

    Raises:
        UserError: there is no such model type or checkpoint.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model in CONFIG_MAPPING and not Path(model).exists():
        return AutoConfig.for_model(model)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{model}' is neither a model type of transformers nor a folder or hub id with a "
            f"config.json ({str(error).splitlines()[0]:.200})"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
