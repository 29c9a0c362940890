"""The embedded demo: a small checkpoint that was fine-tuned on SST-2, and a sample of SST-2."""

from pathlib import Path

DEMO_TASK = "sst2"


def demo_path() -> Path:
    """The folder of the embedded checkpoint (BERT, 6 layers, fine-tuned on SST-2)."""
    return Path(__file__).parent


def demo_data_dir() -> Path:
    """The data folder (--data-dir): SST-2's validation split and a sample of its train split."""
    return Path(__file__).parent / "data"
