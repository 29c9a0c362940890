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

USUAL = "--samples 64 --eval-limit 16 --skip-tune --no-cache --quiet"
DEMO = "--model demo --task sst2"
RUNS: Mapping[str, str] = {
    "demo": f"{DEMO} --constraint 0.5",
    "demo kwon": f"{DEMO} --constraint 0.5 --method kwon",
    "demo taylor": f"{DEMO} --constraint 0.5 --importance taylor",
    "demo uniform": f"{DEMO} --constraint 0.6 --uniform --round-to 32",
}
SHARED_RUNS: Mapping[str, str] = {
    task: f"--model {{shared}}/models/minilm-l6-{task} --task {task} --data-dir {{shared}}/data "
    "--constraint 0.5 0.3"
    for task in ("mrpc", "sst2", "stsb")
}


def digests_of(name: str, flags: str, folder: Path) -> dict[str, str]:
    """SHA-256 of the kept units of every model that the command writes with these flags."""
    from rfprune.main import main

    if main([*flags.split(), *USUAL.split(), "--output-dir", str(folder)]) != 0:
        raise RuntimeError(f"the command failed: {flags}")
    found = {}
    for file in sorted(folder.rglob("masks.safetensors")):
        digest = hashlib.sha256()
        for block, mask in sorted(load_file(file).items()):
            digest.update(block.encode() + (mask != 0).tobytes())
        output = file.parents[1]
        ratio = output.name.removeprefix("mac-")
        found[name if output == folder else f"{name} {ratio}"] = digest.hexdigest()
    return found


if __name__ == "__main__":
    from tests.conftest import shared_folder

    chosen = dict(RUNS)
    if "--shared" in sys.argv:
        chosen |= {
            name: flags.format(shared=shared_folder()) for name, flags in SHARED_RUNS.items()
        }
    earlier = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, flags in chosen.items():
            earlier |= digests_of(name, flags, Path(temporary, name))
    FILE.write_text(json.dumps(earlier, indent=1) + "\n", encoding="utf-8")
