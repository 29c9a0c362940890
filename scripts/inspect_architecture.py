"""What rfprune would need to know of a model type: a row for `rfprune/families/architectures.py`.

    python scripts/inspect_architecture.py deberta-v2
    python scripts/inspect_architecture.py path/to/a/folder/with/config.json

Nothing is downloaded for a model type; a folder or a hub id is read for its config.json alone. The
row is what the sizes, names and order of the modules suggest. Whether it is right, the contract
suite tells: add the row, and a tiny configuration in tests/conftest.py, and run

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


@script("nothing was finished.")
def main(arguments: list[str] | None = None) -> int:
    """Print the row; 2 where there is none, with a sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model type of transformers, a folder, or a hub id")
    model = parser.parse_args(arguments).model
    config = config_of(model)
    text = as_text(config.model_type, suggest(config))
    known = config.model_type in ARCHITECTURES
    print(f"# {'already in' if known else 'to go into'} rfprune/families/architectures.py")
    print(text)
    return 0


def config_of(model: str) -> Any:
    """The configuration of a model type as transformers has it by default, or of a checkpoint.

    Raises:
        UserError: there is neither.
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
