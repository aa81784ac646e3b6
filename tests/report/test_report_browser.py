"""The report in a real browser: every plot is drawn with a size, and nothing is wider than a phone.

The page has no script; a page of the test's own shows it in frames of two widths and measures it.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from PIL import Image
from synthetic_run import write_run

from flowrl.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome here")

WIDTHS = {"phone": 390, "desk": 1200}
MEASURE = """<!doctype html><body>%s<pre id="measured"></pre><script>
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument;
    const box = (e) => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
    const text = (e) => [...e.querySelectorAll("text")].map((t) => t.getBoundingClientRect());
    const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;  // boxes are line-high
    const smallest = (svg) => Math.min(...[...svg.querySelectorAll("text")].map(
      (t) => parseFloat(page.defaultView.getComputedStyle(t).fontSize)
        * box(svg)[0] / svg.viewBox.baseVal.width));
    found[frame.id] = {
      scroll_width: page.documentElement.scrollWidth,
      figures: Object.fromEntries([...page.querySelectorAll("figure")].map((f) => [f.id, {
        size: box(f.querySelector("svg")),
        marks: [...f.querySelectorAll("svg path")].filter((p) => box(p)[0] + box(p)[1] > 0).length,
        font_px: smallest(f.querySelector("svg")),
        overlaps: text(f).filter((a, i) => text(f).some((b, j) => i < j && overlap(a, b))).length,
        outside: text(f).filter((r) => {
          const s = f.querySelector("svg").getBoundingClientRect();
          return r.left < s.left - 1 || r.right > s.right + 1;
        }).length,
      }])),
    };
  }
  document.getElementById("measured").textContent = JSON.stringify(found);
});
</script></body>"""


def browse(tmp_path: Path, page: Path, *options: str) -> bytes:
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    return done.stdout


def measure(tmp_path: Path, report: Path) -> dict:
    frames = "".join(
        f'<iframe id="{name}" src="{report.as_uri()}" '
        f'style="width:{width}px;height:900px;border:0"></iframe>'
        for name, width in WIDTHS.items()
    )
    page = tmp_path / "measure.html"
    page.write_text(MEASURE % frames)
    dom = browse(tmp_path, page, "--allow-file-access-from-files", "--dump-dom").decode()
    found = re.search(r'<pre id="measured">(.+?)</pre>', dom, flags=re.DOTALL)
    assert found is not None, dom[-2000:]
    return json.loads(unescape(found[1]))


def colours(picture: Image.Image) -> set[tuple[int, ...]]:
    found = picture.convert("RGB").getcolors(picture.width * picture.height)
    assert found is not None
    return {colour for _, colour in found}  # type: ignore[misc]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(write_run(tmp_path_factory.mktemp("browser") / "run"))


def test_every_plot_is_drawn_and_fits_a_phone(tmp_path, report):
    measured = measure(tmp_path, report)
    names = set(re.findall(r'<figure class="card" id="([^"]+)"', report.read_text()))
    assert len(names) > 15
    for name, width in WIDTHS.items():
        page = measured[name]
        assert page["scroll_width"] <= width, f"{name}: the page scrolls sideways"
        assert set(page["figures"]) == names
        for figure, found in page["figures"].items():
            drawn_width, drawn_height = found["size"]
            assert 280 <= drawn_width <= width, (name, figure)
            assert drawn_height > 100, (name, figure)
            assert found["marks"] >= 5, f"{name}: {figure} is empty"
            assert found["font_px"] >= 8, f"{name}: {figure} is illegible"
            assert found["overlaps"] == 0, f"{name}: labels of {figure} overlap"
            assert found["outside"] == 0, f"{name}: a label of {figure} is cut off"


def test_the_measurement_sees_an_empty_and_a_wide_page(tmp_path, report):
    """Negative control of the test above."""
    text = re.sub(r"<path .*?/>", "", report.read_text(), flags=re.DOTALL)
    text = text.replace("</header>", '<div style="width:2000px">wide</div></header>')
    text = text.replace("</style>", "svg text { font-size: 40px !important; }</style>")
    broken = tmp_path / "broken.html"
    broken.write_text(text)
    page = measure(tmp_path, broken)["phone"]
    assert page["scroll_width"] > 390
    for figure, found in page["figures"].items():
        assert found["marks"] == 0, figure
        assert found["overlaps"] > 0, figure
        assert found["font_px"] > 30, figure
    assert any(found["outside"] for found in page["figures"].values())


def test_screenshot_shows_the_plots_colours(tmp_path, report):
    picture = tmp_path / "report.png"
    for name, text in (("drawn", report.read_text()), ("blank", None)):
        page = tmp_path / f"{name}.html"
        page.write_text(text or re.sub(r"<svg.*?</svg>", "", report.read_text(), flags=re.DOTALL))
        browse(tmp_path, page, f"--screenshot={picture}", "--window-size=1200,5000")
        seen = colours(Image.open(io.BytesIO(picture.read_bytes())))
        green, purple = (0x08, 0x7F, 0x5F), (0x9A, 0x3F, 0x86)  # the third and fourth series
        assert ({green, purple} <= seen) == (name == "drawn")
