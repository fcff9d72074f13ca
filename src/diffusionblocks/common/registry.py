"""Registries: names to objects, open to a user's own package, which registers by the same calls as ours do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

from .messages import perhaps

Entry = TypeVar("Entry")

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


class Registry(Mapping[str, Entry]):
    """Entries of one kind by name, in the order of their registration.

    Args:
        kind: what an entry is, for messages: "solver", "noise process".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry.

        Args:
            name: letters, digits, '_', '.' or '-', the first a letter.
            entry: what the name stands for.

        Raises:
            ValueError: a name of another form, or one that stands for another entry already.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{self.kind} {name!r}: a name is letters, digits, '_', '.' or '-', the first a letter")
        if self._entries.get(name, entry) != entry:
            raise ValueError(f"{self.kind} {name!r} is registered already; give yours another name")
        self._entries[name] = entry

    def check(self, name: str) -> str:
        """Return a name that stands for an entry.

        Raises:
            ValueError: nothing is registered under it; the message says which names there are.
        """
        if name not in self._entries:
            raise ValueError(f"unknown {self.kind} {name!r}{perhaps(name, self)}; allowed: {', '.join(self)}")
        return name

    def __getitem__(self, name: str) -> Entry:
        """The entry of a name.

        Raises:
            KeyError: nothing is registered under it.
        """
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
