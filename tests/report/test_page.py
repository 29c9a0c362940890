"""The page is one file without requests that fits a phone and is readable in dark mode.

Without these tests a long path could push the page beyond the screen, or a label vanish in dark
mode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rfprune.errors import UserError
from rfprune.report.figures import kept_per_layer, time_by_stage
from rfprune.report.page import (
    render_run,
    render_runs,
    write_family_page,
    write_run_page,
    write_runs_page,
)
from rfprune.report.plots import draw_frontier, draw_kept, draw_run
from rfprune.report.report_json import read_report, write_report
from tests.report.chromium import PROGRAM, Browser, browser
from tests.report.conftest import PROMISE, make_encoder_decoder_report, make_report

Report = dict[str, Any]
MakeReport = Callable[..., Report]


@pytest.fixture
def one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is tested elsewhere; here it would only take time."""
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", (kept_per_layer,))


def test_the_page_is_one_file_with_every_number_of_the_table(report: MakeReport) -> None:
    page = render_run(report(), draw_run(report())).replace("\N{NO-BREAK SPACE}", " ")
    for part in (
        *("80.39", "78.90", "-1.49 points", "577.76 M", "288.00 M", "22.71 M", "90.86 MB"),
        *("200 ms", "100 ms", "2.00x", "0.0123", "408 validation examples", "49.9%"),
        *("block layer.0.heads kept its scales", "rfprune --model some/folder", "<td>3 of 4</td>"),
        *("modeling_rfprune.py", "someone/bert-mrpc", "2.13.0", "trust_remote_code=True"),
        *("default-src 'none'", '<html lang="en">', 'name="viewport" content="width=device-width'),
    ):
        assert part in page, part
    addresses = set(re.findall(r"https?://[^\"' <]*", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "a name, not a place"
    assert "<script" not in page


@pytest.mark.usefixtures("one_figure")
def test_encoder_and_decoder_layers_have_their_own_rows() -> None:
    page = " ".join(render_run(make_encoder_decoder_report(), []).split())
    for kind in ("self-attention heads", "cross-attention heads", "neurons"):
        assert f'<th scope="col">{kind}</th>' in page
    row = '<tr><th scope="row">{}</th><td>{}</td><td>{}</td><td>{}</td></tr>'
    assert row.format("encoder 1", "2 of 4", "\N{EN DASH}", "9 of 12") in page
    assert row.format("decoder 2", "0 of 4", "3 of 4", "8 of 12") in page


@pytest.mark.usefixtures("one_figure")
def test_text_from_users_is_no_markup(report: MakeReport) -> None:
    evil = '<script>alert("x")</script>'
    entries = dict.fromkeys(("model", "source", "command", "output_dir"), evil)
    changed = report(**entries, warnings=[evil], versions={"x": evil})
    page = render_run(changed, draw_run(changed))
    page += render_runs([(evil, changed)], draw_frontier([(evil, changed)]), evil, [evil])
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_page_and_its_plots_are_written_again_from_the_folder(
    report: MakeReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", (kept_per_layer, time_by_stage))
    write_report(report(), tmp_path)
    write_run_page(report(), tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    write_run_page(read_report(tmp_path), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"kept", "seconds"}


def test_the_page_depends_on_the_parts_of_the_report(report: MakeReport) -> None:
    less = report(curves=[], warnings=[], divergence=None)
    for name in ("stages", "original_layers"):
        del less[name]
    page = render_run(less, draw_kept(less))
    assert "<td>3</td>" in page
    assert "Warning" not in page
    plain = render_run(report(settings={"method": "curvature", "uniform": True}), [])
    assert "from_pretrained" in plain
    assert not re.search("trust_remote_code|modeling_rfprune|load_pruned", plain)
    scores = {"original": {"accuracy": 80.0}, "pruned": {"accuracy": None}}
    undefined = report(pruned=report()["pruned"] | {"score": None}, scores=scores, stages=[])
    assert "undefined" in render_run(undefined, [])
    assert "undefined" in render_runs([("a", undefined)], (), "one")
    runs = [("a", report()), ("b", report(evaluated_examples=100))]
    assert "different numbers of validation examples" in render_runs(runs, (), "two")
    assert "Warning:" not in render_runs([("a", report()), ("b", report())], (), "two")


@pytest.mark.parametrize("within", ["", "seed-3"])
def test_a_family_has_a_page_above_its_folders(
    within: str, report: MakeReport, tmp_path: Path
) -> None:
    folders = [tmp_path / "out" / name / within for name in ("mac-0.7", "mac-0.5")]
    for folder, ratio in zip(folders, (0.7, 0.5), strict=True):
        folder.mkdir(parents=True)
        write_report(report(constraint=ratio), folder)
    path = write_family_page(folders)
    assert path == tmp_path / "out" / "family-mac-seed-3.html"
    assert write_family_page(folders[:1]) is None
    page = path.read_text(encoding="utf-8")
    link = folders[0].relative_to(path.parent).as_posix()
    assert f'<a href="{link}/report.html">70%</a>' in page
    assert (path.parent / "family-mac-seed-3-frontier-mrpc.png").is_file()
    assert not list(path.parent.glob(".*"))


def test_a_family_page_that_cannot_be_written_is_an_error(
    report: MakeReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in "ab":
        (tmp_path / name).mkdir()
        write_report(report(), tmp_path / name)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(
        UserError, match=r"family-.*No space left.*models are complete.*scripts/compare.py"
    ):
        write_family_page([tmp_path / "a", tmp_path / "b"])
    assert not list(tmp_path.glob("*.html")) and not list(tmp_path.glob(".*"))


needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="needs chromium")

CONTRASTS = """
(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    if (!node.data.trim()) continue;
    const element = node.parentElement, style = getComputedStyle(element);
    const inside = element.closest("svg");
    const ink = light(parse(inside ? style.fill : style.color)), back = light(paper(element));
    const [low, high] = ink < back ? [ink, back] : [back, ink];
    found.push([(high + 0.05) / (low + 0.05), node.data.trim()]);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of a run and one of a family, with names as long as they come."""
    root = tmp_path_factory.mktemp("pages")
    long = "a-folder-with-a-name-that-never-ends/" * 8
    shown = {
        "model": long,
        "source": long,
        "command": f"rfprune --model {'x' * 300}",
        "warnings": ["w" * 200, "a warning"],
        "promise": PROMISE,
        "layers": [{"heads": index % 13, "neurons": 128 * index} for index in range(24)],
        "original_layers": [{"heads": 12, "neurons": 3072}] * 24,
    }
    write_run_page(make_report(**shown), root)
    runs = [(f"{'run' * 30}-{index}", make_report(**shown)) for index in range(3)]
    write_runs_page(runs, root / "family.html", long, folders=[root / name for name, _ in runs])
    return {"run": root / "report.html", "family": root / "family.html"}


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 768, 1200])
@pytest.mark.parametrize("page", ["run", "family"])
def test_in_a_browser_nothing_overflows_and_all_text_has_contrast(
    page: str, width: int, dark: bool, pages: dict[str, Path], window: Browser
) -> None:
    window.open(pages[page], width=width, dark=dark)
    assert window.complaints() == []
    assert window.evaluate("innerWidth") == width
    assert window.evaluate("document.documentElement.scrollWidth <= innerWidth")
    beyond = window.evaluate(
        "[...document.querySelectorAll('main *:not(.wide, .wide *)')].filter("
        "e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML)"
    )
    assert beyond == []
    background = window.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(17, 21, 26)") == dark
    window.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    contrasts = window.evaluate(CONTRASTS)
    assert len(contrasts) > 50
    assert [text for ratio, text in contrasts if ratio < 4.5] == []


@needs_chromium
def test_in_a_browser_the_summary_fits_a_phone_and_every_figure_has_a_name(
    pages: dict[str, Path], window: Browser
) -> None:
    window.open(pages["run"], width=360)
    assert window.evaluate(
        "(e => e.scrollWidth <= e.clientWidth)(document.querySelector('.scroll'))"
    )
    window.call("Accessibility.enable")
    nodes = window.call("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in nodes if node.get("role", {}).get("value") == "image"]
    assert len(images) == 6
    assert all(len(image["name"]["value"]) > 20 for image in images)


@needs_chromium
def test_the_browser_checks_find_faults(tmp_path: Path, window: Browser) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><body style="color: #999">pale'
        '<div style="width: 2000px">wide</div><script>console.log("said")</script>',
        encoding="utf-8",
    )
    window.open(page, width=360)
    assert any("said" in complaint for complaint in window.complaints())
    assert window.evaluate("document.documentElement.scrollWidth") > 360
    assert min(ratio for ratio, _ in window.evaluate(CONTRASTS)) < 4.5
