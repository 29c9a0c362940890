"""The embedded default: one small real fine-tuned checkpoint and a sample of its task's data."""

from pathlib import Path

DEMO_TASK = "sst2"


def demo_path() -> Path:
    """The folder of the embedded checkpoint (BERT, 6 layers, fine-tuned on SST-2)."""
    return Path(__file__).parent


def demo_data_dir() -> Path:
    """The folder to pass as `--data-dir`: SST-2's validation split and a sample of its train."""
    return Path(__file__).parent / "data"
