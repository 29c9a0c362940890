"""Run bad and hostile input through the command or the API, and check answer and side effects.

A refused input gets one sentence and exit code 2 (a `UserError` from the API), no traceback, and
leaves every file in the working directory, the home, the temporary folder and the cache untouched.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

# Read when huggingface_hub is imported; six such time-outs are waited for.
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "1")

HANG = -1
"""Status of a hub that never answers."""

GARBAGE = 0
"""Status of a hub that answers 200 with a page of HTML."""

HUB_SECONDS = 0.3
"""Time-out of the hub clients in these tests; up to 30 s in production."""

Request = list[str] | Callable[[], object]
"""Flags for the command, or a call of the Python API."""

CODE = "import pathlib\npathlib.Path('executed').touch()\nraise RuntimeError('executed')\n"
"""Python code that leaves a file behind when it is run."""

AFTER_LOADING = {"constraint": 1e-12}
"""Refused after everything is loaded, when code of the checkpoint would have been run."""

_ERROR = "rfprune: error: "


@dataclass(frozen=True)
class Case:
    """One bad input and the answer that it must get.

    Attributes:
        given: the input, in words.
        says: what the answer must contain.
        prepare: creates the input in an empty folder; returns what to run.
        outcome: "refused" (exit code 2 or a UserError, one sentence, nothing left behind), "warned"
            (the run succeeds with a warning and writes nothing but its output) or "loaded".
    """

    given: str
    says: str
    prepare: Callable[[Place], Request]
    outcome: str = "refused"


def parametrize(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Run a test once for every case."""
    names = [case.given for case in cases]
    assert len(set(names)) == len(names), "every case has a name of its own"
    return pytest.mark.parametrize("case", cases, ids=[ascii(name)[1:-1][:70] for name in names])


@dataclass(frozen=True)
class Material:
    """Good inputs, made once and never changed; cases spoil copies of them."""

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
        return self.root / "finished"

    @property
    def cache(self) -> Path:
        """The cache of that run."""
        return self.root / "cache"

    def contents(self) -> Mapping[str, Any]:
        """Size and modification time of every file."""
        return everything_in(self.root)


@dataclass
class Place:
    """An empty working directory for one case; patches are undone afterwards.

    Attributes:
        watched: everything the command could write to lies below this folder.
    """

    material: Material
    folder: Path
    watched: Path
    undo: ExitStack = field(default_factory=ExitStack)

    def flags(self, **changes: Any) -> list[str]:
        """Flags of a small run that succeeds; None removes one, True is a switch."""
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
        """A copy in this folder, to be changed."""
        shutil.copytree(original, name)
        return Path(name)

    def set(self, target: Any, name: str, value: Any) -> None:
        """Patch an attribute during the case."""
        self.undo.enter_context(mock.patch.object(target, name, value))

    def environment(self, **variables: str) -> None:
        """Set environment variables during the case."""
        self.undo.enter_context(mock.patch.dict(os.environ, variables))

    def hub(self, answer: int) -> None:
        """Point the hub clients to a local server that answers every request with `answer`."""
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
    """Skip the pauses between retries."""


@contextmanager
def _hub_answering(answer: int) -> Iterator[str]:
    """Run a server on 127.0.0.1 that always gives one answer; yields its address."""
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
            """Keep the log off the console."""

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


def check(case: Case, place: Place) -> None:
    """Prepare a case, run it, and check answer, exit code and files."""
    with place.undo:
        request = case.prepare(place)
        before = everything_in(place.watched)
        with _captured() as texts:
            code = _run(request)
    out, err = texts
    after = everything_in(place.watched)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if case.outcome == "warned":
        folder = place.folder.relative_to(place.watched)
        own = tuple(f"{folder}/{name}/" for name in ("out", "cache"))
        changed = {name for name in changed if not f"{name}/".startswith(own)}
        assert code == 0, err
        answer = "\n".join(line for line in err.splitlines() if line.startswith("warning: "))
    elif case.outcome == "loaded":
        assert code == 0, err
        answer = err
    else:
        assert (code, out) == (2, ""), f"{(code, out)} == (2, ''): {err}"
        assert err.startswith(_ERROR), err
        answer = err.removesuffix("\n").removeprefix(_ERROR)
        assert answer.endswith("."), answer
        assert answer.isprintable(), "one line, without control characters"
    assert case.says in answer, answer
    assert not changed, f"left behind or changed: {sorted(changed)[:5]}"


def _run(request: Request) -> int | None:
    """Exit code of the command; of a call, the exit code that the command would have."""
    from rfprune.errors import UserError
    from rfprune.main import main

    try:
        if not callable(request):
            return main(request)
        request()
    except UserError as error:
        sys.stderr.write(f"{_ERROR}{error}{'' if str(error).endswith('.') else '.'}\n")
        return 2
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0


@contextmanager
def _captured() -> Iterator[list[str]]:
    """Capture stdout and stderr at the level of file descriptors, so that C libraries count too."""
    texts: list[str] = []
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        files, saved = (out, err), [os.dup(1), os.dup(2)]
        streams = [
            io.TextIOWrapper(
                os.fdopen(os.dup(file.fileno()), "wb"),
                "utf-8",
                errors="backslashreplace",
                line_buffering=True,
                write_through=True,
            )
            for file in files
        ]
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            for number, file in enumerate(files, start=1):
                os.dup2(file.fileno(), number)
            with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
                yield texts
        finally:
            for number, (stream, descriptor) in enumerate(zip(streams, saved, strict=True), 1):
                stream.close()
                os.dup2(descriptor, number)
                os.close(descriptor)
            for file in files:
                file.seek(0)
                texts.append(file.read().decode("utf-8", "replace"))


def everything_in(folder: Path) -> Mapping[str, Any]:
    """Size and modification time of every path below a folder."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name, status = str(path.relative_to(folder)), path.lstat()
        is_folder = path.is_dir() and not path.is_symlink()
        found[name] = "folder" if is_folder else (status.st_size, status.st_mtime_ns)
    return found


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the contents of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_weights(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors of a safetensors file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def with_flags(given: str, says: str, **changes: Any) -> Case:
    """A case of flags alone: those of `Place.flags` with these changes."""
    return Case(given, says, lambda place: place.flags(**changes))
