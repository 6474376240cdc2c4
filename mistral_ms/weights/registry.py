"""What modules make known by a name: kinds of layers, gates."""

from __future__ import annotations

from typing import Generic, TypeVar

from mistral_ms.errors import WeightError

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries by their names.

    Args:
        what: an entry is, for messages.
        where: the key of a configuration that names one.
    """

    def __init__(self, what: str, where: str) -> None:
        self.what, self.where = what, where
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Makes an entry known.

        Raises:
            WeightError: another one has the name.
        """
        if self._entries.get(name, entry) != entry:
            rule = "a name has one meaning"
            raise WeightError(f"{self.what} given twice", where=name, rule=rule)
        self._entries[name] = entry

    def find(self, name: str | None) -> Entry:
        """The entry of a name; None is nobody's.

        Raises:
            WeightError: there is none.
        """
        if name is None or name not in self._entries:
            raise WeightError(
                f"unknown {self.what}",
                where=self.where,
                value=name,
                rule=f"known: {', '.join(sorted(self._entries))}",
                todo="import the module that registers it",
            )
        return self._entries[name]
