"""What a command line says when it fails, and its exit status: one line, of bounded length, without characters that a
terminal obeys."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn

_log = logging.getLogger(__name__)

#: Exit statuses by kind, for `--help`.
STATUSES = """\
exit status: 0 success; 1 an error that was not foreseen; 2 bad input; 3 training diverged; 4 a file could not be read
or written, as on a full disk; 5 out of memory; 130 and 143 stopped by Ctrl-C and SIGTERM (128 + the signal).
DIFFUSIONBLOCKS_TRACEBACK=1 shows where an error came from.
"""
_BAD_INPUT = (
    ValueError,
    TypeError,
    ImportError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)
_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|Unable to allocate", re.IGNORECASE)
_OF_SYSTEM = re.compile(r"\(os error \d+\)|\[Errno \d+\]")

#: Tells in one line what begins.
Say = Callable[[str], None]

#: Characters of a line; of a longer message the beginning and the end are shown, where the value and the fix are.
LONGEST = 900
_END = 300


def one_line(message: object) -> str:
    """A message in one printable line of at most `LONGEST` characters.

    Args:
        message: an exception, or a text of any number of lines.
    """
    text = str(message) or type(message).__name__
    lines = [" ".join(line.split()) for line in text.splitlines()]
    text = "; ".join(line for line in lines if line)
    text = re.sub(r"(?<=[:;,.]); ", " ", text)
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return printable if len(printable) <= LONGEST else f"{printable[: LONGEST - _END - 5]} ... {printable[-_END:]}"


def shorten(text: str, longest: int) -> str:
    """A text, cut off with three dots where it has more than `longest` characters."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def span(low: int, high: int) -> str:
    """What lies from one number to another, as text; one number where both are the same."""
    return f"{low}" if low == high else f"{low} to {high}"


def near(name: str, names: Iterable[str]) -> str:
    """What to say of an unknown name: those that are near it, or all there are."""
    ordered = sorted(names)
    close = difflib.get_close_matches(name, ordered, n=2)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; allowed: {', '.join(ordered)}" if ordered else ""


def perhaps(unknown: str | Iterable[str], names: Iterable[str]) -> str:
    """Which allowed names an unknown one, or the first of several, may mean; nothing where none is near."""
    name = unknown if isinstance(unknown, str) else next(iter(unknown), "")
    close = difflib.get_close_matches(name, sorted(names), n=2, cutoff=0.7)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


@functools.cache
def warn_once(text: str) -> None:
    """Warn of something in the log, once in a process: what is checked in every phase of a run."""
    _log.warning("%s", text)


def announce(line: str) -> None:
    """Tell on standard error, in one line, what begins now."""
    print(one_line(line), file=sys.stderr, flush=True)


def silent(line: str) -> None:
    """Tell nothing."""


def announcer(speaks: bool) -> Say:
    """`announce`, or what tells nothing."""
    return announce if speaks else silent


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that refuses in one line; the usage is in `--help`."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        print(one_line(f"error: {message}{self._perhaps(message)}; see {self.prog} --help"), file=sys.stderr)
        self.exit(2)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """As of `argparse`, but refuse what is unknown here: the line names the help of the command that was given."""
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def _perhaps(self, message: str) -> str:
        """What was meant by an unknown command, choice or option; Python 3.14 says so itself of choices."""
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        if choice is not None:
            return perhaps(choice[1], re.findall(r"[\w.-]+", choice[2]))
        option = re.search(r"unrecognized arguments: .*?(--[\w-]+)", message)
        return "" if option is None else perhaps(option[1], self._options())

    def _options(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from command._options()


def report_errors(action: Callable[[], None], way_on: Callable[[], str] | None = None) -> int:
    """Run a command, and tell of what stops it in one line on standard error.

    Args:
        action: the command.
        way_on: how to go on after what is no fault of the input: a full disk, a signal, too little memory.

    Returns:
        The exit status (`STATUSES`).
    """
    with _stopping() as stopped_by:
        try:
            action()
            sys.stdout.flush()
            return 0
        except BrokenPipeError:  # the reader, `head` say, has seen enough
            _discard_output()
            return 0
        except KeyboardInterrupt:
            return _report(f"stopped by {_name(stopped_by)}", 128 + (stopped_by or [signal.SIGINT])[0], way_on)
        except Exception as error:
            if stopped_by:  # which a library took for an error of its own
                return _report(f"stopped by {_name(stopped_by)}", 128 + stopped_by[0], way_on)
            if getattr(error, "quiet", False):  # another process tells
                return getattr(error, "exit_status", 1)
            if os.environ.get("DIFFUSIONBLOCKS_TRACEBACK"):
                traceback.print_exc()
            status, text = _status_of(error)
            return _report(text, status, way_on if status in (1, 4, 5) else None)


def _status_of(error: Exception) -> tuple[int, str]:
    own = getattr(error, "exit_status", None)
    if own is not None:
        return own, str(error) if own > 128 else f"error: {error}"
    if isinstance(error, MemoryError) or (isinstance(error, (RuntimeError, OSError)) and _OF_MEMORY.search(str(error))):
        advice = "lower train.batch_size or evaluate.batch_size; `diffusionblocks plan` tells what fits"
        return 5, f"error: out of memory: {error or 'the host has no more'}; {advice}"
    if isinstance(error, _BAD_INPUT):
        return 2, f"error: {error}"
    if isinstance(error, OSError):
        if error.errno is None:
            return 4, f"error: {error}"
        return (
            4,
            f"error: {error.filename or 'standard output'}: {error.strerror}; free or change what stands in the way",
        )
    if _OF_SYSTEM.search(str(error)):
        return 4, f"error: {error}"
    if type(error).__name__ == "SafetensorError":
        return 2, f"error: damaged or not safetensors: {error}"
    where = "this was not foreseen, DIFFUSIONBLOCKS_TRACEBACK=1 shows where it came from"
    return 1, f"error: {type(error).__name__}: {error}; {where}"


def _report(text: str, status: int, way_on: Callable[[], str] | None) -> int:
    rank = os.environ.get("RANK", "0")  # of several processes that torchrun started
    if rank != "0":
        if status > 128:  # the first one says so for all
            return status
        text = f"rank {rank}: {text}"
    more = ""
    if way_on is not None:
        with contextlib.suppress(Exception):  # what to say about it must not hide what happened
            more = way_on()
    with contextlib.suppress(OSError):
        print(one_line(f"{text}; {more}" if more else text), file=sys.stderr)
    _discard_output()
    return status


def _discard_output() -> None:
    """Let what standard output cannot take go, now and when the interpreter ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _name(stopped_by: list[int]) -> str:
    return signal.Signals((stopped_by or [signal.SIGINT])[0]).name


@contextlib.contextmanager
def _stopping() -> Iterator[list[int]]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, and are noted in a list."""
    stopped_by: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped_by
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped_by.append(signum)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped_by
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
