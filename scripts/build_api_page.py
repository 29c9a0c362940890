"""Write rfprune/README.md, the API page, from the docstrings of the public names.

python scripts/build_api_page.py            # write it
python scripts/build_api_page.py --check    # write nothing; exit code 1 where it is stale
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rfprune
from rfprune.cli.exit_codes import script

PAGE = Path(__file__).resolve().parents[1] / "rfprune" / "README.md"
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Sources")
HEADING = re.compile(rf"^({'|'.join(SECTIONS)}):$")
ENTRY = re.compile(r"^(\*{0,2}\w+(?: \([^)]*\))?): (.*)$")

INTRODUCTION = """\
# Python API

Written by `python scripts/build_api_page.py` from the docstrings; tests run the examples.

`B` examples, `S` tokens, `C` channels, `H` x `W` pixels, `d` hidden size, `U` units of a block.
Examples without imports use a `model` of transformers, its `tokenizer`, a list `batches` of its
inputs, and the `result` of pruning it.
"""


@script("nothing was written.")
def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page; 1 where it is stale."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    options = parser.parse_args(arguments)
    text = page()
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    if options.check:
        sys.stderr.write(f"{PAGE} is stale: run python scripts/build_api_page.py\n")
        return 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


def page() -> str:
    """The whole page."""
    names = [name for name in rfprune.__all__ if not name.startswith("_")]
    objects = {name: getattr(rfprune, name) for name in names}
    functions = [name for name in names if inspect.isfunction(objects[name])]
    classes = [name for name in names if inspect.isclass(objects[name])]
    others = [name for name in names if name not in (*functions, *classes)]
    parts = [INTRODUCTION]
    for title, chosen in (("Functions", functions), ("Classes", classes)):
        parts.append(f"## {title}\n")
        parts += [part for name in chosen for part in entry(name, objects[name])]
    if others:
        parts.append("## Types\n")
        parts += [f"- `{name}`: `{shown(objects[name])}`" for name in others]
        parts.append("")
    return "\n".join(parts)


def entry(name: str, value: Any) -> Iterator[str]:
    """Heading, signature and docstring of one public name, and of its public methods."""
    yield f"### {name}\n"
    yield f"```text\n{signature(name, value)}\n```\n"
    yield from documentation(value)
    if inspect.isclass(value) and not issubclass(value, Warning | Exception):
        for method, function in vars(value).items():
            function = getattr(function, "__func__", function)
            if method.startswith("_") or not inspect.isfunction(function):
                continue
            yield f"#### {name}.{method}\n"
            yield f"```text\n{signature(method, function)}\n```\n"
            yield from documentation(function)


def signature(name: str, value: Any) -> str:
    """The signature, a parameter a line where it is long."""
    if inspect.isclass(value) and issubclass(value, Warning | Exception):
        return f"class {name}({value.__bases__[0].__name__})"
    parameters = inspect.signature(value)
    text = f"{name}{parameters}".replace("'", "")
    if len(text) <= 88:
        return text
    kinds = list(parameters.parameters.values())
    lines, starred = [], False
    for parameter in kinds:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("    *,")
            starred = True
        lines.append(f"    {parameter!s},".replace("'", ""))
    returns = parameters.return_annotation
    arrow = "" if returns is parameters.empty else f" -> {returns}".replace("'", "")
    return "\n".join((f"{name}(", *lines, f"){arrow}"))


def documentation(value: Any) -> Iterator[str]:
    """A docstring in Google's style as Markdown."""
    title, body = "", list[str]()
    for line in [*(inspect.getdoc(value) or "").splitlines(), "Returns:"]:
        found = HEADING.match(line)
        if found is None:
            body.append(line)
            continue
        yield from section(title, body)
        title, body = found[1], []


def section(title: str, body: Sequence[str]) -> Iterator[str]:
    """One section of a docstring; the first one has no title."""
    text = inspect.cleandoc("\n".join(["", *body])).strip()
    if not text:
        return
    if title == "Example":
        yield f"```pycon\n{text}\n```\n"
        return
    if not title:
        yield text + "\n"
        return
    yield f"**{title}**\n"
    if not ENTRY.match(text.splitlines()[0]):
        yield " ".join(text.split()) + "\n"
        return
    for line in text.splitlines():
        found = ENTRY.match(line)
        yield f"- `{found[1]}`: {found[2]}" if found else f"  {line.strip()}"
    yield ""


def shown(value: Any) -> str:
    """A type alias as it is written in signatures."""
    return str(value).replace("collections.abc.", "").replace("torch.Tensor", "Tensor")


if __name__ == "__main__":
    sys.exit(main())
