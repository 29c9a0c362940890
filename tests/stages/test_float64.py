"""Sums in float64, on devices that have it.

Without these tests a stage could use float64 on an Apple GPU, which ends in a traceback.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rfprune.stages.float64 import float64_device, to_float64

STAGES = Path(__file__).resolve().parents[2] / "rfprune" / "stages"


@pytest.mark.parametrize(
    ("device", "place"), [("mps", "cpu"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_the_cpu_replaces_devices_without_float64(device: str, place: str) -> None:
    assert float64_device(torch.device(device)) == torch.device(place)


def test_values_are_detached() -> None:
    values = torch.tensor([0.1, 0.2], requires_grad=True)
    found = to_float64(values)
    assert (found.dtype, found.requires_grad) == (torch.float64, False)
    assert torch.equal(found.float(), values)
    assert to_float64(torch.tensor([True]), torch.device("mps")).item() == 1.0


def test_stages_convert_through_to_float64_only() -> None:
    made = {
        (path.stem, call)
        for path in STAGES.glob("*.py")
        for call in re.findall(r"\S*\.double\(\)", path.read_text(encoding="utf-8"))
    }
    assert {stem for stem, call in made if not call.endswith(".cpu().double()")} == {"float64"}
