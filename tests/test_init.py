"""The public names: all there, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rfprune


@pytest.mark.parametrize("name", rfprune.__all__)
def test_public_name_can_be_used(name: str) -> None:
    assert getattr(rfprune, name) is not None
    assert name in dir(rfprune)


def test_other_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prone'"):
        _ = rfprune.prone


def test_version_is_the_package_s() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^version = "(.+)"', project, re.MULTILINE) == [rfprune.__version__]
