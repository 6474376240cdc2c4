"""Enumerations whose members are texts, in every supported version of Python."""

from __future__ import annotations

import sys
from enum import Enum

if sys.version_info >= (3, 11):
    from enum import StrEnum
else:

    class StrEnum(str, Enum):
        """Of Python 3.11: a member is its value, also where it is formatted."""

        __str__ = str.__str__

        def __format__(self, spec: str) -> str:
            return str.__format__(self, spec)


__all__ = ["StrEnum"]
