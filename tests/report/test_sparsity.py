"""What report, page and card say about zeros has the numbers of the report.

Without these tests a user could not tell what a sparse model saves, and where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rfprune.report.card import render_card
from rfprune.report.console_table import write_log
from rfprune.report.page import render_run
from rfprune.report.summary import sparsity_lines, summary_rows, title

MakeReport = Callable[..., dict[str, Any]]


@pytest.fixture
def sparse(report: MakeReport) -> MakeReport:
    """`sparse(pattern, **changes)`: a run that kept all units and set weights to zero."""

    def make(pattern: str = "2:4", **changes: Any) -> dict[str, Any]:
        settings = {
            "sparsity": pattern,
            "sparsity_criterion": "obs",
            "sparsity_scope": "layer" if ":" in pattern else "global",
        }
        zeros = {
            "density": 0.5,
            "layers": [0.45, 0.5, 0.55],
            "weights": 12_000_000,
            "zeros": 6_000_000,
            "saved_bytes": 10_500_000,
            "maps": [],
        }
        made = report(constraint=None, sparsity=zeros, plain=True, **changes)
        made["settings"] |= settings
        return made

    return make


def test_the_rows_have_what_is_left_and_its_compressed_size(sparse: MakeReport) -> None:
    rows = {row[0]: row[1:] for row in summary_rows(sparse())}
    assert rows["non-zero parameters"] == ("22.71 M", "9.00 M", "39.6%")
    assert rows["weights, compressed"] == ("90.86 MB", "29.50 MB", "32.5%")


def test_the_title_says_the_pattern(sparse: MakeReport, report: MakeReport) -> None:
    assert "with 2:4 sparsity by obs (2048 calibration" in title(sparse())
    assert "with 75% zeros by obs (global) (2048" in title(sparse("0.75"))
    assert "sparsity" not in title(report())


def test_what_runs_faster_is_said_for_each_pattern(sparse: MakeReport, report: MakeReport) -> None:
    semi_structured, anywhere = (" ".join(sparsity_lines(sparse(each))) for each in ("2:4", "0.5"))
    for text in (semi_structured, anywhere):
        assert "by layer, in percent: 45, 50, 55" in text
        assert "In plain PyTorch zeros cost as much time and memory as other numbers" in text
    assert "to_sparse_semi_structured" in semi_structured
    assert "to_sparse_semi_structured" not in anywhere
    assert sparsity_lines(report()) == []


def test_card_page_and_log_show_them(sparse: MakeReport, tmp_path: Any) -> None:
    made = sparse()
    card, page = render_card(made), render_run(made, [])
    log = write_log(made, tmp_path).read_text()
    for text in (card, page, log):
        assert "non-zero parameters" in text
        assert "45, 50, 55" in text
    assert "Whole attention heads" not in card
    assert "trust_remote_code=True" not in card
    assert "some-folder" not in card
    assert "folder-mrpc-pruned-sparsity-2of4" in card
    assert "55.0%" in page
