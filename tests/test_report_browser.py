"""The page in a browser without a window, light and dark; where there is no such browser this is left out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import test_report
from runs import call

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome")
WATCH = "<script>window.wrong = []; addEventListener('error', e => wrong.push(e.message));</script>"
USE = """<script>
const found = {}, column = (table, i) => [...table.tBodies[0].rows].map(row => row.cells[i].firstChild.textContent);
const numbers = document.querySelector("table.sortable");
const heads = [...numbers.tHead.querySelectorAll("th")], button = heads[2].querySelector("button");
found.before = column(numbers, 2);
button.click(); found.up = column(numbers, 2); found.upSaid = heads[2].getAttribute("aria-sort");
button.click(); found.down = column(numbers, 2); found.downSaid = heads[2].getAttribute("aria-sort");
heads[0].querySelector("button").click();
found.names = [...numbers.tBodies[0].rows].map(row => row.cells[0].textContent);
found.other = heads[2].getAttribute("aria-sort");
const search = document.querySelector("input[type=search]"), said = search.closest("details").querySelector("tbody");
const seen = () => [...said.rows].filter(row => row.getClientRects().length).length;
const type = text => { search.value = text; search.dispatchEvent(new Event("input")); return seen(); };
found.search = [seen(), type("prompt <7>"), type("no such words"), type("ROME paris"), type("")];
found.ground = getComputedStyle(document.body).backgroundColor;
found.wide = document.documentElement.scrollWidth <= innerWidth;
found.ink = [...document.querySelectorAll("svg text")].map(text => getComputedStyle(text).fill);
found.wrong = wrong;
const out = document.createElement("pre"); out.id = "found"; out.textContent = JSON.stringify(found);
document.body.append(out);
</script></body>"""


def browse(page: Path, *, dark: bool, width: int = 1280) -> tuple[dict[str, Any], str]:
    """What the page did when it was used, and what the browser complained about."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [str(BROWSER), *flags, scheme, profile, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    dumped = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert dumped, done.stderr[-2000:]
    text = dumped[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(text), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize("dark", [False, True])
def test_it_sorts_searches_and_has_nothing_to_complain_about(tmp_path: Path, dark: bool) -> None:
    test_report.write(tmp_path / "runs", "base", 1.0, hint=0.5)
    test_report.write(tmp_path / "runs", "memit", 0.1)
    assert call("report", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)).code == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    used = tmp_path / "used.html"
    used.write_text(text.replace("<head>", "<head>" + WATCH).replace("</body>", USE), encoding="utf-8")
    found, said = browse(used, dark=dark)
    assert found["wrong"] == [] and said == "", said
    assert found["before"] == ["1", "0.5", "20", "-"]
    assert (found["up"], found["upSaid"]) == (["0.5", "1", "20", "-"], "ascending")
    assert (found["down"], found["downSaid"]) == (["20", "1", "0.5", "-"], "descending")  # what is missing stays last
    names = [re.sub(r"\?$", "", name) for name in found["names"]]
    assert names == sorted(names) and found["other"] is None
    assert found["search"] == [20, 1, 0, 20, 20]
    brightness = sum(int(n) for n in re.findall(r"\d+", found["ground"])[:3]) / 3
    assert (brightness < 64) if dark else (brightness > 192)
    assert found["wide"] and len(set(found["ink"])) == 1 and found["ink"][0] != found["ground"]
    assert browse(used, dark=dark, width=500)[0]["wide"]  # tables scroll in themselves, the page does not
