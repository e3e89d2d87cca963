"""The report's page in a real browser: no overflow, every figure visible, all data of the pictures there."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.report.page import make_report, write_report
from tests.support.report_tree import write_plan, write_slices, write_tree

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason=f"no browser here: apt install chromium ({', '.join(BROWSERS)})"
    ),
]
PROBE = """
<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("load", async () => {
  const box = node => { const r = node.getBoundingClientRect(); return [r.width, r.height]; };
  const downloads = {};
  for (const link of document.querySelectorAll("a[download]"))
    downloads[link.download] = await (await fetch(link.href)).text();
  const seen = {
    errors, downloads,
    title: document.title,
    width: [document.documentElement.scrollWidth, document.documentElement.clientWidth],
    figures: Object.fromEntries([...document.querySelectorAll("figure")].map(f => [f.id, box(f.querySelector("svg"))])),
    headings: [...document.querySelectorAll("h2")].map(h => h.innerText),
    tables: [...document.querySelectorAll("table")].map(t => t.rows.length),
    text: document.body.innerText.length,
    verdict: getComputedStyle(document.querySelector(".notice.good")).backgroundColor,
  };
  const place = document.createElement("pre");
  place.id = "probe";
  place.textContent = JSON.stringify(seen);
  document.body.append(place);
});
</script>
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a written report and the same page with a script that measures it."""
    plan = write_plan(tmp_path_factory.mktemp("browser"))
    write_tree(plan)
    write_slices(plan)
    page = write_report(make_report(plan, datetime(2026, 11, 23, tzinfo=UTC)), Path(plan.output) / "report")
    policy = re.compile(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>'
    )  # allows no script, so not this one
    probed = policy.sub("", page.read_text()).replace("</head>", PROBE + "</head>")
    page.with_name("probed.html").write_text(probed)
    return page.parent


def browse(*argv: str, cwd: Path) -> str:
    """Return the browser's output."""
    assert BROWSER
    shared = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    profile = f"--user-data-dir={cwd / 'profile'}"
    command = [BROWSER, *shared, profile, "--virtual-time-budget=10000", *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=True).stdout


def seen_at(width: int, folder: Path) -> dict[str, Any]:
    """Return the script's measurements in a window of this width."""
    page = (folder / "probed.html").as_uri()
    document = browse(f"--window-size={width},900", "--dump-dom", page, cwd=folder)
    found = re.search(r'<pre id="probe">(.*?)</pre>', document, re.DOTALL)
    assert found, document[-2000:]
    answer: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    return answer


@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_is_shown_whole(folder: Path, width: int) -> None:
    seen = seen_at(width, folder)
    assert seen["errors"] == []
    assert seen["title"].startswith("made-up")
    assert seen["width"][0] <= seen["width"][1], "the page scrolls sideways"
    assert set(seen["figures"]) == {"learning-rates", "perplexity-cost", "loss-curves"}
    for wide, high in seen["figures"].values():
        assert wide > 0.5 * min(width, 900)
        assert high > 100
    assert {"Result", "Runs", "Data", "Plan"} <= set(seen["headings"])
    assert all(rows > 1 for rows in seen["tables"])
    assert seen["verdict"] != "rgba(0, 0, 0, 0)"
    if width == 1280:
        for name, text in seen["downloads"].items():
            assert text == (folder / "data" / name).read_text()
        assert set(seen["downloads"]) == {path.name for path in (folder / "data").glob("*.csv")}


def test_a_picture_of_it_is_not_blank(folder: Path) -> None:
    import matplotlib.image

    browse("--window-size=1280,3000", "--screenshot=page.png", (folder / "index.html").as_uri(), cwd=folder)
    picture = matplotlib.image.imread(folder / "page.png")[..., :3]
    assert picture.shape[:2] == (3000, 1280)
    rows_with_ink = (picture.std(axis=(1, 2)) > 0.01).mean()
    assert rows_with_ink > 0.5
