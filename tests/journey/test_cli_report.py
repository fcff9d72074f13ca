"""diffusionblocks report: one page about runs that holds all they left, alone, as text, and readable on a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import TINY_VIT, VIT, sample, sets
from PIL import Image

from diffusionblocks.cli import main
from diffusionblocks.reports.page import RunReport, recipe_differences

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

#: Ends with what a browser says of a page 390 px wide: its width, and its pictures that are not there.
_LOOK = """<!doctype html><iframe id="page" style="width:390px;height:800px;border:0" srcdoc="{page}"></iframe><script>
page.onload = () => {{
  const inside = page.contentDocument, images = [...inside.images].filter(image => !image.naturalWidth);
  const width = inside.documentElement.scrollWidth
  document.body.append(`width ${{width}} missing ${{images.length}} of ${{inside.images.length}}`)
}}</script>"""

REFRESH = '<meta http-equiv="refresh"'


class Parts(HTMLParser):
    """The tags of a page, and the places that its attributes and styles name."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.places: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "xlink:href", "action") or name.startswith("on"):
                self.places.append(value or "")
            else:
                self.handle_data(value or "")

    def handle_data(self, data: str) -> None:
        self.places += re.findall(r"""(?:url\(|@import )["']?([^)"']*)""", data)


def report(out: Path, *arguments: Path | str) -> str:
    assert main(["report", *map(str, arguments), "--out", str(out)]) == 0
    return out.read_text()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "digits"
    rows = ["end-to-end-1-x3", "diffusionblocks"]
    small = sets(train__steps=4, train__log_every=2, evaluate__limit=50)
    assert main(["compare", VIT, "--out", str(folder), "--quiet", "--rows", *rows, *TINY_VIT, *small]) == 0
    return folder


@pytest.fixture(scope="module")
def page_of_comparison(comparison: Path) -> str:
    return report(comparison.parent / "page.html", comparison)


def test_a_comparison_shows_rows_votes_memory_and_levels(comparison: Path, page_of_comparison: str) -> None:
    table = json.loads((comparison / "table.json").read_text())
    assert table["finished"] is True
    blocks = table["rows"][1]
    rules = {row["combine"] for row in blocks["accuracies"]}
    assert rules == {"mean", "product", "probabilities", "chain"}
    for rule in rules:
        assert f"<td>diffusionblocks</td><td>{rule}</td>" in page_of_comparison
    assert f"{blocks['peak_memory_bytes'] / 2**20:.1f} MiB" in page_of_comparison
    assert f"{100 * blocks['test_accuracy']:.2f} +- " in page_of_comparison, "as the table was printed"
    assert "<td>blocks.num_blocks</td>" not in page_of_comparison, "it is the same in both"
    assert "<td>method</td><td>end-to-end</td><td>diffusionblocks</td>" in page_of_comparison
    assert html.escape(table["torch"]) in page_of_comparison
    assert page_of_comparison.count("<svg ") == 3, "a loss of each row, and the levels of the blocks"


def test_a_run_shows_its_trunk_samples_and_predicted_memory(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert sample(folder, folder / "samples", "--labels", "3") == 0
    page = report(tmp_path / "page.html", folder)
    assert "Training loss of the trunk" in page
    assert {"samples/grid.png", "samples/chain.png", "samples/routing.png"} <= set(re.findall(r'alt="([^"]+)"', page))
    assert "(predicted)" in page
    assert json.loads((folder / "result.json").read_text())["torch"] in page


def test_a_page_is_alone_and_all_that_runs_wrote_is_text(tmp_path: Path) -> None:
    bad = "</pre></title><script>alert(1)</script><img src=x onerror=alert(1)>$\\frac$"
    folder = tmp_path / "<script>alert(2)</script>".replace("/", ":")
    (folder / "samples").mkdir(parents=True)
    recipe = {"name": bad, "method": bad, "model": {"type": bad, bad: {bad: [bad]}}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    record = {"iteration": 1, "unit": bad, "step": 1, "loss": 1.0}
    (folder / "log.jsonl").write_text(f"{json.dumps(record)}\n" + '{"iteration": 2, "un')
    result = {"rows": [{bad: bad, "combine": None}], "command": bad, "device": bad, "torch": bad, "commit": bad}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "samples" / "samples.txt").write_text(bad)
    (folder / "samples" / "grid.png").write_bytes(b"no picture")
    secret = tmp_path / "secret.txt"
    secret.write_text("outside of the run")
    (folder / "samples" / "link.txt").symlink_to(secret)
    page = report(tmp_path / "page.html", folder)
    assert page.count(html.escape(bad, quote=False)) + page.count(html.escape(bad).replace("&#x27;", "&#39;")) > 5
    assert "outside of the run" not in page
    parts = Parts()
    parts.feed(page)
    assert {"svg", "style"} <= parts.tags, "the charts are read too"
    assert not {"script", "img", "iframe"} & parts.tags, "neither a run's text nor a file that is no picture"
    assert [place for place in parts.places if not place.startswith(("#", "data:"))] == [], "nothing is fetched"


def test_watch_writes_the_page_until_the_run_has_ended(
    tmp_path: Path, comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "run", tmp_path / "page.html"
    source = comparison / "diffusionblocks"
    statuses: list[int] = []
    watching = threading.Thread(
        target=lambda: statuses.append(main(["report", str(folder), "--out", str(out), "--watch", "1"]))
    )
    watching.start()

    def shows(text: str) -> bool:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if out.is_file() and text in out.read_text():
                return True
            time.sleep(0.05)
        return False

    assert shows(REFRESH), "the run need not have begun"
    folder.mkdir()
    shutil.copy(source / "recipe.json", folder)
    (folder / "log.jsonl").write_text((source / "log.jsonl").read_text().splitlines()[0] + "\n")
    assert shows(" / 4</span>"), "steps of the units that have begun"
    assert "not begun" in out.read_text()
    assert REFRESH in out.read_text()
    for name in ("log.jsonl", "result.json"):
        shutil.copy(source / name, folder)
    watching.join(60)
    assert statuses == [0]
    assert REFRESH not in out.read_text()
    assert "about left" not in out.read_text()


def test_a_restarted_run_has_not_ended(tmp_path: Path) -> None:
    small = sets(train__steps=2, evaluate__limit=10)
    assert main(["train", VIT, "--out", str(tmp_path), "--quiet", *TINY_VIT, *small]) == 0
    assert (tmp_path / "result.json").is_file()
    assert main(
        ["train", VIT, "--out", str(tmp_path), "--quiet", "--restart", *TINY_VIT, *small, "--set", "train.lr=1e30"]
    )
    assert not (tmp_path / "result.json").exists(), "it diverged: what the run before it measured is not its own"


def test_recipe_differences() -> None:
    recipes = [{"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "d": [1], "e": None}]
    runs = [RunReport(str(index), Path(), recipe) for index, recipe in enumerate(recipes)]
    assert recipe_differences(runs) == [{"field": "a.c", "values": [2, 3]}]
    assert recipe_differences(runs[:1]) == []


def test_what_cannot_be_shown_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "holds no run: give a folder that train, compare or ablate wrote to" in capsys.readouterr().err
    (tmp_path / "recipe.json").write_text("{")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    assert "recipe.json is not JSON" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--watch", "0"]) == 2
    assert "--watch" in capsys.readouterr().err


# ---- in a browser ------------------------------------------------------------------------------------------------


def look(page: str, folder: Path) -> tuple[int, int, int, list[str]]:
    """Width at 390 px, pictures that are missing, all pictures, and lines of the console."""
    assert CHROMIUM is not None
    place = folder / "look.html"
    place.write_text(_LOOK.format(page=html.escape(page)))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
    ]
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *options, profile, "--dump-dom", place.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    numbers = re.search(r"width (\d+) missing (\d+) of (\d+)", result.stdout)
    assert numbers, result.stderr
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return int(numbers[1]), int(numbers[2]), int(numbers[3]), console


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_a_phone_shows_the_page(comparison: Path, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    shutil.copytree(comparison, folder)
    (folder / "diffusionblocks" / "samples").mkdir()
    Image.new("L", (900, 40)).save(folder / "diffusionblocks" / "samples" / "grid.png")
    page = report(tmp_path / "page.html", folder)
    assert look(page, tmp_path) == (390, 0, 1, [])
    broken = page.replace("<h1>", '<img src="data:image/png;base64,AAAA"><div style="width:600px">.</div><h1>', 1)
    width, missing, pictures, console = look(broken + "<script>console.error('heard')</script>", tmp_path)
    assert width >= 600
    assert (missing, pictures) == (1, 2)
    assert any("heard" in line for line in console), "the browser's console is read"
