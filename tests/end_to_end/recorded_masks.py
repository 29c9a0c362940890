"""Record which units the command keeps, so that a refactoring that moves a bit is seen.

    python -m tests.end_to_end.recorded_masks            # the demo
    python -m tests.end_to_end.recorded_masks --shared   # and the shared checkpoints

writes recorded_masks.json beside this file. Write it only where a change of the masks is intended.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.numpy import load_file

FILE = Path(__file__).with_suffix(".json")

DEMO = "--model demo --task sst2"
RUNS: Mapping[str, str] = {
    "demo": f"{DEMO} --constraint 0.5 --samples 64",
    "demo kwon": f"{DEMO} --constraint 0.5 --samples 64 --method kwon",
    "demo taylor": f"{DEMO} --constraint 0.5 --samples 64 --importance taylor",
    "demo uniform": f"{DEMO} --constraint 0.6 --samples 64 --uniform --round-to 32",
}
SHARED_RUNS: Mapping[str, str] = {
    f"{task} {ratio}": f"--model {{shared}}/models/minilm-l6-{task} --task {task} "
    f"--data-dir {{shared}}/data --samples 64 --constraint {ratio}"
    for task in ("mrpc", "sst2", "stsb")
    for ratio in (0.5, 0.3)
}


def digest_of(flags: str, folder: Path) -> str:
    """SHA-256 of the kept units of every block, after running the command with these flags."""
    from rfprune.main import main

    usual = "--eval-limit 16 --skip-tune --no-cache --quiet --output-dir"
    if main([*flags.split(), *usual.split(), str(folder)]) != 0:
        raise RuntimeError(f"the command failed: {flags}")
    digest = hashlib.sha256()
    for name, mask in sorted(load_file(folder / "masks.safetensors").items()):
        digest.update(name.encode() + (mask != 0).tobytes())
    return digest.hexdigest()


def record(runs: Mapping[str, str]) -> dict[str, str]:
    """The digest of every run, by its name."""
    with tempfile.TemporaryDirectory() as temporary:
        return {name: digest_of(flags, Path(temporary, name)) for name, flags in runs.items()}


if __name__ == "__main__":
    from tests.conftest import shared_folder

    chosen = dict(RUNS)
    if "--shared" in sys.argv:
        chosen |= {
            name: flags.format(shared=shared_folder()) for name, flags in SHARED_RUNS.items()
        }
    earlier = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    FILE.write_text(json.dumps(earlier | record(chosen), indent=1) + "\n", encoding="utf-8")
