"""The report in a real browser, at the width of a phone and of a desk."""

import json
import shutil
import subprocess
from html import escape

import pytest
from run_folder import write_evaluation

from tuna_peft.evaluation.report.write import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
    "--disable-dev-shm-usage", "--window-size=1400,900",
]  # fmt: skip
WIDTHS = (320, 390, 800, 1280)

# Frames of each width hold the report; what is measured inside goes into the title, which --dump-dom prints.
PROBE = """
<script>
onload = () => {
  const names = elements => elements.map(e => e.tagName + "." + e.className).slice(0, 5);
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, width = frame.clientWidth;
    page.querySelectorAll("details").forEach(details => details.open = true);
    const inside = [...page.querySelectorAll("main *")];
    const box = element => element.getBoundingClientRect();
    return {
      width,
      scroll: page.documentElement.scrollWidth,
      outside: names(inside.filter(e => box(e).width && !e.closest("thead, .scroll *"))
        .filter(e => box(e).right > width + 1 || box(e).left < -1)),
      clipped: names(inside.filter(e => !e.closest("svg, thead, .scroll") && getComputedStyle(e).display != "inline")
        .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1)),
      labels: [...page.querySelectorAll("svg text")].filter(e => {
        const outer = box(e.closest("svg")), inner = box(e);
        return inner.right > outer.right + 1 || inner.left < outer.left - 1 || inner.bottom > outer.bottom + 1;
      }).map(e => e.textContent).slice(0, 5),
      figures: [...page.querySelectorAll("figure")].map(e => {
        const drawn = [...e.querySelectorAll("path, use")].filter(e => box(e).width || box(e).height);
        return [drawn.length, Math.round(box(e.querySelector("svg")).height)];
      }),
      hidden: [...page.querySelectorAll("table.stages tbody td")].filter(e => e.textContent && !box(e).height).length,
    };
  });
  document.title = JSON.stringify(found);
};
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_the_report_in_a_browser(run_folder, tmp_path):
    frames = ""
    for folder in (run_folder, write_evaluation(tmp_path / "evaluation")):
        write_report(folder)
        page = escape((folder / "report.html").read_text(), quote=True)
        for width in WIDTHS:
            frames += f'<iframe width="{width}" height="800" style="border:0" srcdoc="{page}"></iframe>'
    (tmp_path / "probe.html").write_text(f"<!doctype html><title></title>{frames}{PROBE}")
    command = [
        BROWSER,
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"file://{tmp_path}/probe.html",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    title = ran.stdout.partition("<title>")[2].partition("</title>")[0]
    found = json.loads(title.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert [entry["width"] for entry in found] == [*WIDTHS, *WIDTHS]
    assert "CONSOLE" not in ran.stderr  # nothing ran, nothing failed, nothing was refused
    for entry, figures in zip(found, [21] * len(WIDTHS) + [3] * len(WIDTHS), strict=True):
        assert entry["scroll"] <= entry["width"] and not entry["outside"] and not entry["clipped"], entry
        assert not entry["labels"], entry
        assert len(entry["figures"]) == figures and not entry["hidden"]
        assert all(drawn > 2 and height > 20 for drawn, height in entry["figures"])
