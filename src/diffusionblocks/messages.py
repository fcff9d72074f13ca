"""What a command line says when it refuses: one line, of bounded length, without characters that a terminal obeys."""

from __future__ import annotations

import argparse
import re
import sys
from typing import NoReturn

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
    joined = "; ".join(line for line in lines if line)
    joined = re.sub(r"(?<=[:;,.]); ", " ", joined)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - _END - 5]} ... {shown[-_END:]}"


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that refuses in one line; the usage is in `--help`."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        print(one_line(f"error: {message}; see {self.prog} --help"), file=sys.stderr)
        self.exit(2)
