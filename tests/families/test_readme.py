"""The README of the families lists the rows there are, and its links lead somewhere.

Without this test the documentation could promise a family that has no row.
"""

from __future__ import annotations

import re
from pathlib import Path

from rfprune import families
from rfprune.families.architectures import ARCHITECTURES
from rfprune.families.support import REFUSED

README = Path(families.__file__).with_name("README.md")
TEXT = README.read_text(encoding="utf-8")


def words_in_table(section: str, column: int) -> set[str]:
    """The words in code style in one column of a section's table."""
    rows = TEXT.split(f"## {section}\n")[1].split("\n## ")[0].splitlines()
    cells = [row.split("|")[column] for row in rows if row.startswith("|")]
    return {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)}


def test_the_tables_list_the_rows() -> None:
    assert words_in_table("Supported models", 2) == set(ARCHITECTURES)
    assert set(REFUSED) <= words_in_table("What is refused", 1)
    required = {entry for row in ARCHITECTURES.values() for entry in row.required_config}
    assert all(f"`{entry}" in TEXT for entry in required)


def test_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
