"""What a command line says when it refuses is one line that a terminal can print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffusionblocks.cli import main
from diffusionblocks.cli.command import say_when_slow
from diffusionblocks.common.messages import LONGEST, one_line
from diffusionblocks.common.progress import Progress, is_progress

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("not a recipe:\n  train.lr: too low\n  name: missing\n", "not a recipe: train.lr: too low; name: missing"),
        ("Error(s) in loading:\n\ta differs.\n\tb is unexpected.", "Error(s) in loading: a differs. b is unexpected."),
        ("a\r\n\n  b\u2028c", "a; b; c"),
        ("\x1b[31mred\x00", "\\x1b[31mred\\x00"),
        ("ümlaut and \u65e5\u672c", "ümlaut and \u65e5\u672c"),
        (ValueError(), "ValueError"),
    ],
)  # fmt: skip
def test_a_message_is_one_printable_line(message: object, line: str) -> None:
    assert one_line(message) == line


def test_of_a_long_message_both_ends_are_shown() -> None:
    line = one_line(f"train.lr = {'9' * 5000} is too high; set it to 1")
    assert len(line) <= LONGEST
    assert line.startswith("train.lr = 999")
    assert line.endswith("999 is too high; set it to 1")


@pytest.mark.parametrize(("total", "first"), [(4, "encode a: b.txt: 4 images"), (None, "encode a: b.txt: images")])
def test_long_work_tells_how_far_it_is_and_how_long_it_takes(
    total: int | None, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("encode a: b.txt", total, "images", seconds=0) as progress:
        progress.update(1)
        progress.update(3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == first
    if total is None:
        assert lines[1:] == ["encode a: b.txt: 1 images", "encode a: b.txt: 4 images"]
    else:
        assert lines[1:] == [f"encode a: b.txt: {count} of 4 images, 0:00:00 left" for count in (1, 4)]
    assert all(map(is_progress, lines))
    later = Progress("encode train", 90_000_000, "characters")
    later.update(1_000)
    assert later._line(3.0) == "encode train: 1,000 of 90,000,000 characters, 3 days, 2:59:57 left"
    assert is_progress(later._line(3.0))


@pytest.mark.parametrize(
    "line", ["error: limit: 3 of 4 images", "warning: x: 3 images", "4 images", "a.png: 4 images!"]
)
def test_other_lines_are_no_progress(line: str) -> None:
    assert not is_progress(line)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["sample", "recipe.yaml", "--count", "two"],
        ["sample", "recipe.yaml", "--solver", "x\ny"],
        ["inspect"],
        ["inspect", "recipe.yaml", "--seed", "1"],
        ["merge", "a"],
        ["bench", "memory", "--batch-size", "x" * 5000],
        ["bench"],
    ],
)
def test_arguments_are_refused_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(" --help")
    assert len(line) <= LONGEST


def test_the_encoder_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["encode", "--size", "wide"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: argument --size: invalid int value: 'wide'; see ")


@pytest.mark.parametrize(
    ("arguments", "command"),
    [(["inspect", "vit/digits", "--setting", "a=1"], " inspect"), (["--setting", "inspect", "vit/digits"], "")],
)
def test_an_unknown_option_leads_to_the_help_of_its_command(
    arguments: list[str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: unrecognized arguments: --setting")
    assert line.endswith(f"; see diffusionblocks{command} --help")


@pytest.mark.slow
def test_libraries_say_nothing_on_standard_error() -> None:
    """diffusers and torchao log at their import, which only a fresh process shows."""
    command = [sys.executable, "-m", "diffusionblocks", "inspect", str(RECIPES / "dit" / "digits.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert done.stderr == ""


def test_refusal_of_encode_is_one_line():
    """What libraries say while an option's choices import them does not stand before the error."""
    command = [sys.executable, "-m", "diffusionblocks", "encode", "--source", "a", "--vae", "b", "--out", "c"]
    result = subprocess.run([*command, "--check", "-1"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "error: --check -1: must be at least 0\n")


def test_slow_work_is_told_of_once_in_so_many_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([100.0, 104.0, 106.0, 107.0, 110.0, 112.0])
    monkeypatch.setattr("diffusionblocks.cli.command.time.monotonic", lambda: next(times))
    say = say_when_slow("plan", 5.0)
    for line in "abcde":
        say(line)
    assert capsys.readouterr().err == "plan: b (6 s so far)\nplan: e (12 s so far)\n"
