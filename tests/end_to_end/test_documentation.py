"""Every README: its commands exist, its Python runs, its links lead somewhere.

Deleting this lets a renamed flag, script or function stay in the text that newcomers copy from.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import AutoModelForSequenceClassification

from rfprune import load_pruned
from rfprune.cli.parser import parse
from rfprune.demo import demo_data_dir, demo_path
from rfprune.main import main
from tests.conftest import make_tiny_batch, make_tiny_model, make_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for path in ROOT.rglob("README.md")
    if not {".venv", "outputs", "node_modules"} & set(path.relative_to(ROOT).parts)
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MAX_README_LINES = 300


def blocks(language: str) -> list[tuple[str, str]]:
    """Fenced blocks of a language: the page and the text."""
    return [
        (str(page.relative_to(ROOT)), text)
        for page in PAGES
        for found, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if found == language
    ]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Command lines of all pages: of fenced blocks, and those that stand in a sentence or table."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = [block for language, block in FENCE.findall(text) if language in ("", "sh")]
        lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`(python [^`]+)`", FENCE.sub("", text))
        for line in lines:
            if "$" in line or not re.match(r"\s*([A-Z_]+=\S* )*(python|rfprune|accelerate) ", line):
                continue
            words = shlex.split(line, comments=True)
            while "=" in words[0]:
                words = words[1:]  # variables of the environment
            yield str(page.relative_to(ROOT)), words


COMMANDS = list(commands())


def named(cases: list[tuple[str, Any]]) -> list[str]:
    return [f"{page}-{number}" for number, (page, _) in enumerate(cases)]


def test_the_front_page_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_README_LINES


def test_there_are_commands_and_snippets_to_check() -> None:
    assert len(COMMANDS) >= 40
    assert len(blocks("python")) >= 3


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=named(COMMANDS))
def test_a_command_has_flags_that_exist(page: str, words: list[str], tmp_path: Path) -> None:
    """Each command line is understood as it stands; what it does is tested elsewhere."""
    program, *arguments = words
    if program == "accelerate":
        program, arguments = "python", arguments[arguments.index("-m") :]
    if program == "rfprune" or arguments[:2] in (["-m", "rfprune.main"], ["-m", "rfprune"]):
        flags = arguments if program == "rfprune" else arguments[2:]
        if flags != ["--help"]:
            offline = ["--hub-dry-run"] if "--push-to-hub" in flags else []
            parse([*flags, *offline, "--output-dir", str(tmp_path / "out")])
        return
    help_text = help_of(arguments)
    for word in arguments:
        if word.startswith("--"):
            assert re.search(rf"(?<![\w-]){re.escape(word.split('=')[0])}(?![\w-])", help_text), (
                word
            )


def help_of(arguments: list[str]) -> str:
    """What a script prints with --help."""
    import contextlib
    import io

    module = script(arguments)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        module.main([*subcommand(module, arguments), "--help"])
    return text.getvalue()


def script(arguments: list[str]) -> Any:
    if arguments[0] == "-m":
        return importlib.import_module(arguments[1])
    path = ROOT / arguments[0]
    assert path.is_file(), f"no script {arguments[0]}"
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def subcommand(module: Any, arguments: list[str]) -> list[str]:
    """The name of a measurement, where one program has several."""
    after = arguments[2:] if arguments[0] == "-m" else arguments[1:]
    names = getattr(module, "SUBCOMMANDS", ())
    return after[:1] if after and after[0] in names else []


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that snippets take for granted."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    model.save_pretrained("checkpoint")
    tokenizer.save_pretrained("checkpoint")
    return {
        "model": model,
        "tokenizer": tokenizer,
        "batches": [make_tiny_batch(8, 9, seed=seed) for seed in range(8)],
        "folder": "smaller",
    }


SNIPPETS = blocks("python")


@pytest.mark.filterwarnings("ignore:MyClassifier is not a class:rfprune.errors.RfpruneWarning")
@pytest.mark.parametrize("page", sorted({page for page, _ in SNIPPETS}))
def test_the_python_of_a_page_runs_in_its_order(page: str, names: dict[str, Any]) -> None:
    for other, text in SNIPPETS:
        if other == page:
            exec(compile(text, page, "exec"), names)


def test_the_api_page_is_made_from_the_docstrings_as_they_are() -> None:
    assert script(["scripts/build_api_page.py"]).main(["--check"]) == 0


RECIPES = [words for page, words in COMMANDS if page == "README.md" and "--task" in words]
SMALL = "--samples 32 --eval-limit 32 --no-cache --quiet --output-dir out"


@pytest.mark.parametrize("words", RECIPES, ids=lambda words: " ".join(words[5:7]))
def test_a_recipe_runs(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, on fewer examples; the demo replaces the checkpoint and the data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    arguments = [*words[3:], *SMALL.split()]
    model = arguments[arguments.index("--model") + 1]
    if model == "path/to/checkpoint":
        arguments[arguments.index(model)] = "demo"
        table = pd.read_parquet(demo_data_dir() / "sst2" / "train.parquet").head(100)
        table["verdict"] = table.pop("label").map({0: "Negative", 1: "Positive"})
        table.rename(columns={"sentence": "review"}).to_csv("reviews.csv", index=False)
    elif model != "demo":
        pytest.skip("needs the hub")
    assert main(arguments) == 0
    original = AutoModelForSequenceClassification.from_pretrained(demo_path())
    assert load_pruned("out").num_parameters() < original.num_parameters()


LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    missing = [link for link in local if not (page.parent / link).exists()]
    assert missing == []
