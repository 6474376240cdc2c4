"""Stop strings in streamed text, wherever the boundaries between tokens fall."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string.

    A stop string may be spread over many tokens. So text that could be the beginning of one is
    held back until it is certain that it is not. The stop string that is complete first wins, and
    of several that end at the same character the longest; therefore the result does not depend on
    how the text was cut into pushes.

    Args:
        stops: the strings, none of them empty; there may be none at all.

    Attributes:
        matched: the stop string that ended the text; None while there was none.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""  # the beginning of a stop string, perhaps
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come; from then on no text is let through."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """Takes the next piece of text.

        Returns:
            The text that is certain to come before any stop string.
        """
        if self.stopped:
            return ""
        text = self._held + text
        found = [
            (at + len(stop), -len(stop), stop)
            for stop in self._stops
            if (at := text.find(stop)) >= 0
        ]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return text[: end - len(self.matched)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text ends here: what was held back was no stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
