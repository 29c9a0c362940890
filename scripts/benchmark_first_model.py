"""How long is it from `git clone` to the first pruned model, and how much disk does that take?

Clones the repository into a temporary folder, runs `make demo` there in an environment of its own,
with no package in pip's cache, and writes seconds and bytes; nothing of it is kept.

python scripts/benchmark_first_model.py --output results/first_model_MACHINE.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INSTALL = "make .venv/installed"
PRUNE = "make demo"
_INHERITED = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "MAKEFLAGS", "RFPRUNE_CACHE")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 something failed."""
    options = _parser().parse_args(argv)
    try:
        if options.output.exists():
            raise RuntimeError(f"'{options.output}' is there already: name a new file")
        if not options.output.absolute().parent.is_dir():
            raise RuntimeError(f"'{options.output.absolute().parent}' is no folder")
        with tempfile.TemporaryDirectory(prefix="first-model-") as name:
            result = measure(options.source, Path(name), options.install_command, options.command)
    except RuntimeError as error:
        sys.stderr.write(f"benchmark_first_model: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("benchmark_first_model: interrupted; nothing was written.\n")
        return 130
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"seconds": result["seconds"], "bytes": result["bytes"]}, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", default=str(ROOT), metavar="REPOSITORY", help="what is cloned")
    parser.add_argument(
        "--install-command", default=INSTALL, metavar="COMMAND", help=f"default: {INSTALL}"
    )
    parser.add_argument("--command", default=PRUNE, metavar="COMMAND", help=f"default: {PRUNE}")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a new file")
    return parser


def measure(source: str, folder: Path, install: str, prune: str) -> dict[str, Any]:
    """Clone, install and prune below an empty folder, as somebody would who is new.

    Raises:
        RuntimeError: a step failed, or left no model; the last lines of what it said are in it.
    """
    clone, home = folder / "rfprune", folder / "home"
    home.mkdir()
    steps = {
        # Files, not links to those of this disk, as from a server.
        "clone": (["git", "clone", "--quiet", "--no-hardlinks", source, str(clone)], folder),
        "install": (shlex.split(install), clone),
        "prune": (shlex.split(prune), clone),
    }
    seconds = {name: _seconds(*step, _environment(home)) for name, step in steps.items()}
    models = sorted((clone / "outputs").rglob("report.json"))
    if not models:
        raise RuntimeError(f"'{prune}' left no model in {clone / 'outputs'}")
    report = json.loads(models[0].read_text(encoding="utf-8"))
    output = models[0].parent
    size = {"environment": _bytes(clone / ".venv"), "model": _bytes(output)}
    size["weights"] = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    size["history"] = _bytes(clone / ".git")
    shutil.rmtree(clone / ".venv", ignore_errors=True)
    shutil.rmtree(clone / "outputs")
    size["repository"] = _bytes(clone)
    return {
        "seconds": seconds | {"total": sum(seconds.values())},
        "bytes": size,
        "run": {name: report.get(name) for name in ("command", "seconds", "achieved", "versions")},
        "commands": {"install": install, "prune": prune},
        "commit": _commit(clone),
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "load": _load()},
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _environment(home: Path) -> dict[str, str]:
    """Nothing of ours: another home, and so no cache of pip's or of rfprune's."""
    kept = {name: value for name, value in os.environ.items() if name not in _INHERITED}
    cache = str(home / "cache")
    return kept | {"HOME": str(home), "XDG_CACHE_HOME": cache, "PIP_CACHE_DIR": f"{cache}/pip"}


def _seconds(command: Sequence[str], folder: Path, environment: dict[str, str]) -> float:
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise RuntimeError(f"'{shlex.join(command)}' cannot be run ({error.strerror})") from error
    if done.returncode:
        said = " / ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise RuntimeError(f"'{shlex.join(command)}' ended with {done.returncode}: {said}")
    return time.perf_counter() - start


def _bytes(folder: Path) -> int:
    """Of all files below, a file with several names once; links count nothing."""
    files = (path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum({status.st_ino: status.st_size for status in files}.values())


def _commit(clone: Path) -> str:
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _load() -> float | None:
    """Processes that wanted a CPU in the last minute: how much the machine had to do besides."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


if __name__ == "__main__":
    sys.exit(main())
