"""Seconds from `git clone` to the first pruned model, and bytes on the disk.

python -m scripts.bench.first_model

Clones the repository into a temporary folder and runs `make demo` there, in an environment of its
own and with an empty package cache. Nothing of it is kept. Every commit is one measurement.
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
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rfprune.cli.exit_codes import RESUMABLE, script
from rfprune.errors import UserError
from scripts.bench import harness
from scripts.bench.harness import Conditions

INSTALL, PRUNE = "make .venv/installed", "make demo"
_NOT_INHERITED = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "MAKEFLAGS", "RFPRUNE_CACHE")


@script(RESUMABLE)
def main(argv: Sequence[str] | None = None) -> int:
    """Run with these flags (default: those of the process): 0 done, 2 user error, 130
    interrupted."""
    options = _parser().parse_args(argv)
    cores = os.cpu_count()
    wanted = {
        "cloned_commit": _commit(options.source),
        "install_command": options.install_command,
        "command": options.command,
    }
    output = options.output or harness.default_output("first_model", f"{cores}core")
    same = {"system": platform.platform(), "cores": cores}
    return harness.complete(
        __file__, output, [wanted], partial(_measure, options.source), same=same
    )


def _parser() -> argparse.ArgumentParser:
    parser = harness.parser_of(__doc__, "")
    add = parser.add_argument
    add("--source", default=str(harness.ROOT), metavar="REPOSITORY", help="cloned; default: this")
    add("--install-command", default=INSTALL, metavar="COMMAND", help=f"default: {INSTALL}")
    add("--command", default=PRUNE, metavar="COMMAND", help=f"default: {PRUNE}")
    return parser


def _commit(source: str) -> str:
    """The commit that a clone would check out."""
    command = ["git", "ls-remote", source, "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        raise UserError(f"--source {source} is not a repository with a commit: name one to clone.")
    return done.stdout.split()[0]


def _measure(source: str, group: Sequence[Conditions]) -> Iterator[dict[str, Any]]:
    for conditions in group:
        with tempfile.TemporaryDirectory(prefix="first-model-") as folder:
            commands = conditions["install_command"], conditions["command"]
            found = measure(source, Path(folder), *commands)
        yield conditions | found


def measure(source: str, folder: Path, install: str, prune: str) -> dict[str, Any]:
    """Clone, install and prune below an empty folder, as a newcomer would.

    Raises:
        UserError: a step failed, or left no model; the last lines of its output are in it.
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
        raise UserError(f"'{prune}' left no model in {clone / 'outputs'}: give another --command.")
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
        "run": {
            name: report.get(name)
            for name in ("command", "settings", "seconds", "achieved", "versions")
        },
        "load_average": round(os.getloadavg()[0], 1),
    }


def _environment(home: Path) -> dict[str, str]:
    """Of a new user: another home, and so an empty cache of pip and of rfprune."""
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    cache = str(home / "cache")
    return kept | {"HOME": str(home), "XDG_CACHE_HOME": cache, "PIP_CACHE_DIR": f"{cache}/pip"}


def _seconds(command: Sequence[str], folder: Path, environment: dict[str, str]) -> float:
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UserError(f"'{shlex.join(command)}' cannot be run ({error.strerror}).") from error
    if done.returncode:
        output = " / ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise UserError(f"'{shlex.join(command)}' ended with {done.returncode}: {output}")
    return time.perf_counter() - start


def _bytes(folder: Path) -> int:
    """Of all files below, a file with several names once; links count nothing."""
    files = (path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum({status.st_ino: status.st_size for status in files}.values())


if __name__ == "__main__":
    sys.exit(main())
