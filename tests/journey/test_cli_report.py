"""diffusionblocks report: one page about runs that holds all they left, alone, as text, and readable on a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from commands import TINY_VIT, VIT, sample, sets
from PIL import Image

from diffusionblocks.cli import main
from diffusionblocks.reports.page import RunReport, recipe_differences

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

#: Ends with what a browser says of a page 390 px wide: its width, its pictures that are not there, whether it is dark,
#: and the least contrast of a text with what is behind it (WCAG's; readable from 4.5).
_LOOK = """<!doctype html><meta name="color-scheme" content="light dark">
<iframe id="page" style="width:390px;height:800px;border:0" srcdoc="{page}"></iframe><script>
page.onload = () => {{
  const inside = page.contentDocument, images = [...inside.images].filter(image => !image.naturalWidth);
  const width = inside.documentElement.scrollWidth, style = element => page.contentWindow.getComputedStyle(element);
  const parts = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => parts(color).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {{
    for (; element; element = element.parentElement) {{
      const color = style(element).backgroundColor;
      if (parts(color)[3] !== 0) return color;
    }}
    return "rgb(255, 255, 255)";
  }};
  let least = 21;
  for (const element of inside.querySelectorAll("main *")) {{
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    const ink = element.closest("svg") ? style(element).fill : style(element).color;
    if (element.closest("style, title") || !ink.startsWith("rgb")) continue;
    const [low, high] = [light(ink), light(behind(element))].sort((a, b) => a - b);
    least = Math.min(least, (high + 0.05) / (low + 0.05));
  }}
  const dark = page.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches;
  document.body.append(`width ${{width}} missing ${{images.length}} of ${{inside.images.length}}`);
  document.body.append(` dark ${{dark}} contrast ${{least.toFixed(2)}}`);
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
    assert f"{100 * blocks['test_accuracy']:.2f} ± " in page_of_comparison
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


def _measured(folder: Path) -> Path:
    """The file of levels of a run, written into its folder."""
    levels = folder / "levels.json"
    assert main(["evaluate", str(folder), "--by-level", "--json", str(levels)]) == 0
    return levels


@pytest.fixture(scope="module")
def measured(comparison: Path) -> Path:
    """A run of blocks alone, with what they say by level."""
    folder = comparison.parent / "measured"
    shutil.copytree(comparison / "diffusionblocks", folder)
    _measured(folder)
    return folder


def test_a_run_shows_what_its_blocks_say_by_level(measured: Path, tmp_path: Path) -> None:
    page = report(tmp_path / "page.html", measured)
    assert 'aria-label="Cross-entropy of each block against noise level"' in page
    assert "workspace" not in page, "it was trained on the CPU: no GPU's workspace is predicted"
    rows = json.loads((measured / "levels.json").read_text())["by_level"]
    assert {row["block"] for row in rows} == {0, 1, 2}
    for row in rows:
        assert f"<td>{row['level']:.4g}</td><td>{row['block']}</td><td>True</td><td>{row['accuracy']:.4g}</td>" in page


def test_a_run_that_trains_anew_shows_nothing_of_the_model_before(measured: Path, tmp_path: Path) -> None:
    """The model and the levels beside it are of the run that was there, until the new one ends."""
    folder = tmp_path / "run"
    shutil.copytree(measured, folder)
    (folder / "result.json").unlink()  # as --restart does
    _in_json("recipe.json", lambda values: values["blocks"].update(num_blocks=2, layers=[1, 2]))(folder)
    page = report(tmp_path / "page.html", folder)
    assert "Cross-entropy of each block" not in page
    layers = re.findall(r"<td>\d</td><td>(0|1-2|[12])</td>", page)
    assert layers == ["0", "1-2"], "of the recipe, not of the model of three blocks"


def _in_json(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return damage


def _in_log(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
        (folder / "log.jsonl").write_text("".join(change(lines)))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a line cut in the middle": (_in_log(lambda lines: [lines[0][:20] + "\n", *lines[1:]]), "line 1 is not JSON"),
    "lines in another order": (_in_log(lambda lines: lines[::-1]), "has iteration 10, after 12"),
    "a loss that is no number": (
        _in_log(lambda lines: [re.sub(r'"loss": [^,]+', '"loss": NaN', line) for line in lines]),
        "line 1: loss: Input should be a finite number",
    ),
    "the last lines lost": (_in_log(lambda lines: lines[:3]), "holds files of two runs: its logs end after"),
    "a vote as text": (
        _in_json("result.json", lambda values: values["rows"][0].update(accuracy="0.9")),
        "vote.accuracy: Input should be a valid number (got",
    ),
    "a vote cut off": (
        _in_json("result.json", lambda values: values["rows"][0].pop("ece")),
        "vote.ece: Field required",
    ),
    "no rows": (_in_json("result.json", lambda values: values.update(rows={})), "rows: Input should be a valid list"),
    "a level of another block": (
        _in_json("levels.json", lambda values: values["by_level"][0].update(block=1)),
        "levels.json is of other blocks than the run's: block 1 at level",
    ),
    "levels of another model": (
        _in_json("levels.json", lambda values: values.update(model="0" * 64)),
        "levels.json is of another model than",
    ),
    "levels without numbers": (
        _in_json("levels.json", lambda values: values["by_level"][0].update(cross_entropy=None)),
        "levels.json is damaged: by_level.0.cross_entropy: Input should be a valid number",
    ),
    "boundaries of other blocks": (
        _in_json("model/diffusionblocks.json", lambda values: values["partition"]["boundaries"].__setitem__(1, 0.01)),
        "diffusionblocks.json",
    ),
    "a recipe without sections": (_in_json("recipe.json", lambda values: values.update(model=[1])), "no section"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused_and_no_page_is_written(
    name: str, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(measured, folder)
    damage, message = DAMAGES[name]
    damage(folder)
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert str(folder) in line
    assert not (tmp_path / "page.html").exists()


TABLE_DAMAGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "another peak": (
        lambda values: values["rows"][0].update(peak_memory_bytes=1),
        "peak_memory_bytes is 1, and memory",
    ),
    "a score of text": (lambda values: values["rows"][0].update(test_accuracy="x"), "is damaged, as in row"),
    "no iterations": (lambda values: values["rows"][0].pop("iterations"), "rows.0.iterations: Field required"),
    "a row twice": (lambda values: values["rows"].append(values["rows"][0]), "row end-to-end-1-x3 is there twice"),
}


@pytest.mark.parametrize("name", TABLE_DAMAGES)
def test_a_damaged_table_is_refused(
    name: str, comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "compared"
    shutil.copytree(comparison, folder)
    change, message = TABLE_DAMAGES[name]
    _in_json("table.json", change)(folder)
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


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
    (tmp_path / "samples").mkdir()
    for name in ("grid.png", "samples.txt", "notes.md"):
        (tmp_path / "samples" / name).touch()
    assert main(
        ["train", VIT, "--out", str(tmp_path), "--quiet", "--restart", *TINY_VIT, *small, "--set", "train.lr=1e30"]
    )
    assert not (tmp_path / "result.json").exists(), "it diverged: what the run before it measured is not its own"
    assert [file.name for file in (tmp_path / "samples").iterdir()] == ["notes.md"], "nor are its samples"


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


@dataclass(frozen=True)
class Look:
    """What a browser says of a page 390 px wide; `contrast` is the least of a text."""

    width: int
    missing: int
    pictures: int
    dark: bool
    contrast: float
    console: tuple[str, ...]


def look(page: str, folder: Path, *more: str) -> Look:
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
        *more,
    ]
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *options, profile, "--dump-dom", place.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = re.search(r"width (\d+) missing (\d+) of (\d+) dark (\w+) contrast ([\d.]+)", result.stdout)
    assert seen, result.stderr
    console = tuple(line for line in result.stderr.splitlines() if "CONSOLE" in line)
    return Look(int(seen[1]), int(seen[2]), int(seen[3]), seen[4] == "true", float(seen[5]), console)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_a_phone_shows_the_page_in_light_and_dark(comparison: Path, measured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    shutil.copytree(comparison, folder)
    shutil.copy(measured / "levels.json", folder / "diffusionblocks")
    (folder / "diffusionblocks" / "samples").mkdir()
    Image.new("L", (900, 40)).save(folder / "diffusionblocks" / "samples" / "grid.png")
    page = report(tmp_path / "page.html", folder).replace("<details", "<details open")
    for dark, flags in ((False, ()), (True, ("--force-dark-mode",))):
        seen = look(page, tmp_path, *flags)
        assert (seen.width, seen.missing, seen.pictures, seen.dark, seen.console) == (390, 0, 1, dark, ())
        assert seen.contrast >= 4.5
    broken = page.replace("<h1>", '<img src="data:image/png;base64,AAAA"><div style="width:600px">.</div><h1>', 1)
    broken = broken.replace("<h1>", '<h1 style="color:#1c2330">', 1)  # the ink of a light page
    seen = look(broken + "<script>console.error('heard')</script>", tmp_path, "--force-dark-mode")
    assert seen.width >= 600
    assert (seen.missing, seen.pictures) == (1, 2)
    assert seen.contrast < 1.5
    assert any("heard" in line for line in seen.console), "the browser's console is read"
