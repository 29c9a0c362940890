"""Where bad inputs are tried: good material to spoil, a hub that misbehaves, and what is kept an
eye on.

The tiny models are those of the tests (`tests/conftest.py`), so this needs the extra rfprune[dev].
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts and tests import each other

# The client reads it when it is imported, and waits so long six times.
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "1")

HANG = -1
"""The answer of a hub that says nothing at all."""

GARBAGE = 0
"""The answer of a hub that says 200, and then something that is no answer."""

HUB_SECONDS = 0.3
"""How long a hub is waited for here, which is up to 30 s elsewhere."""

FINISHED = "finished"


@dataclass(frozen=True)
class Material:
    """What is made once and never changed; cases spoil copies of it."""

    root: Path

    @property
    def model(self) -> Path:
        """A tiny BERT with a head for two classes, and its tokenizer."""
        return self.root / "model"

    @property
    def headless(self) -> Path:
        """The same without a head."""
        return self.root / "headless"

    @property
    def data(self) -> Path:
        """A `--data-dir` for mrpc and squad."""
        return self.root / "data"

    @property
    def finished(self) -> Path:
        """The output of a run with the usual flags."""
        return self.root / FINISHED


@dataclass
class Place:
    """An empty folder, the current one while a case is prepared and run; undone afterwards."""

    material: Material
    folder: Path
    undo: ExitStack = field(default_factory=ExitStack)

    def flags(self, **changes: Any) -> list[str]:
        """The flags of a small run that would succeed; None takes one away, True is a switch."""
        values: dict[str, Any] = {
            "model": self.material.model,
            "task": "mrpc",
            "data_dir": self.material.data,
            "constraint": 0.5,
            "samples": 16,
            "batch_size": 8,
            "output_dir": "out",
            "quiet": True,
            "skip_tune": True,
        }
        made: list[str] = []
        for name, value in (values | changes).items():
            if value is None:
                continue
            made.append("--" + name.replace("_", "-"))
            if isinstance(value, list | tuple):
                made += [str(part) for part in value]
            elif value is not True:
                made.append(str(value))
        return made

    def copy(self, original: Path, name: str) -> Path:
        """A copy in this folder, to be spoilt."""
        shutil.copytree(original, name)
        return Path(name)

    def set(self, target: Any, name: str, value: Any) -> None:
        """Change an attribute for the time of the case."""
        self.undo.enter_context(mock.patch.object(target, name, value))

    def environment(self, **variables: str) -> None:
        """Set variables of the environment for the time of the case."""
        self.undo.enter_context(mock.patch.dict(os.environ, variables))

    def hub(self, answer: int) -> None:
        """Let the hub's libraries talk to a hub that answers everything with this status."""
        import datasets
        from huggingface_hub import constants
        from huggingface_hub.utils import close_session

        from rfprune.hub import upload

        endpoint = self.undo.enter_context(_hub_answering(answer))
        self.environment(HF_ENDPOINT=endpoint, HF_TOKEN="hf_of-nobody", no_proxy="127.0.0.1")
        for module in (constants, datasets.config):
            self.set(module, "HF_HUB_OFFLINE", False)
        self.set(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        self.set(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        self.set(datasets.config, "HF_ENDPOINT", endpoint)
        for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
            self.set(constants, name, HUB_SECONDS)
        self.set(upload, "ANSWER_SECONDS", HUB_SECONDS)
        self.set(time, "sleep", _no_sleep)
        self.undo.callback(close_session)


def _no_sleep(_: float) -> None:
    """The libraries wait before they try again; nobody has to watch that."""


@contextmanager
def _hub_answering(answer: int) -> Iterator[str]:
    """A server on 127.0.0.1 with one answer for everybody; gives its address."""
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.close_connection = True
            if answer == HANG:
                released.wait(60)
                return
            body = b"<html>not what you wanted" if answer == GARBAGE else b'{"error": "as told"}'
            self.send_response(answer or 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = _handle

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def make_material(root: Path, run: Callable[[list[str]], int]) -> Material:
    """Make models, data and, by `run` (the command), a finished output."""
    from tests.conftest import make_tiny_model, make_tiny_tokenizer, write_parquet

    material = Material(root)
    make_tiny_model().save_pretrained(material.model)
    make_tiny_model(head="none").save_pretrained(material.headless)
    for folder in (material.model, material.headless):
        make_tiny_tokenizer().save_pretrained(folder)
    for split, size in (("train", 24), ("validation", 12)):
        pairs = [
            {"sentence1": f"good film {i}", "sentence2": f"bad film {i % 5}", "label": i % 2}
            for i in range(size)
        ]
        questions = [
            {
                "id": str(i),
                "question": "what city ?",
                "context": f"the city of {i}",
                "answers": {"text": ["city"], "answer_start": [4]},
            }
            for i in range(size)
        ]
        write_parquet(material.data / "mrpc" / f"{split}.parquet", pairs)
        write_parquet(material.data / "squad" / f"{split}.parquet", questions)
    flags = Place(material, root).flags(output_dir=material.finished)
    if run(flags) != 0:
        raise RuntimeError("the run with good input failed: there is nothing to spoil")
    return material


@contextmanager
def sandbox() -> Iterator[Path]:
    """A temporary root: everything that the command could write to is below it.

    The current folder, the home, the folder for temporary files and the cache are `watched`; what
    the hub's own library keeps of its questions is beside them.
    """
    with ExitStack() as undo:
        root = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="bad-inputs-")))
        watched = root / "watched"
        for name in ("home", "temporary", "here"):
            (watched / name).mkdir(parents=True)
        variables = {
            "HOME": str(watched / "home"),
            "TMPDIR": str(watched / "temporary"),
            "RFPRUNE_CACHE": str(watched / "cache"),
        }
        undo.enter_context(mock.patch.dict(os.environ, variables))
        undo.enter_context(mock.patch.object(tempfile, "tempdir", variables["TMPDIR"]))
        before = Path.cwd()
        undo.callback(lambda: os.chdir(before))
        yield root


def everything_in(folder: Path) -> Mapping[str, Any]:
    """Every path below a folder with what would change if somebody wrote to it."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name, status = str(path.relative_to(folder)), path.lstat()
        is_folder = path.is_dir() and not path.is_symlink()
        found[name] = "folder" if is_folder else (status.st_size, status.st_mtime_ns)
    return found


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_weights(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors of a safetensors file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
