"""YAML of others: no code, no bombs, nothing that is lost without a word.

PyYAML's safe loader runs no code, but a few aliases of aliases become a billion values as soon as
somebody prints or copies them, a key that stands twice loses its first value, and its constructors
fail in ways of their own on values like ``!!int ""``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from mistral_ms.reading import DEPTH

MOST_VALUES = 100_000
"""Values of a document, every alias written out."""
LONGEST_NUMBER = 100
"""Characters; sexagesimal numbers of a megabyte would take hours to add up."""


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEPTH:  # before its scanner, which needs quadratic time, comes to the end
            raise ValueError(f"nested deeper than {DEPTH}")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        own = [self.construct_object(key, deep=True) for key, _ in node.value if not _merges(key)]
        for number, key in enumerate(own):
            if isinstance(key, Hashable) and key in own[:number]:
                mark = node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} occurs twice", mark)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        numeric = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if numeric and len(value) > LONGEST_NUMBER:
            raise ValueError(f"a number of {len(value)} characters")
        return value


def _merges(key: yaml.Node) -> bool:
    return bool(key.tag == "tag:yaml.org,2002:merge")


def parse_yaml(text: str) -> Any:
    """Parses one document.

    Raises:
        ValueError: it is not YAML, holds an unknown tag, a key twice or a value that its tag
            cannot have, is nested deeper than ``DEPTH``, has more than ``MOST_VALUES`` values
            with its aliases written out, or refers to itself. The message is one line.
    """
    loader = None
    try:
        loader = _Loader(text)  # refuses characters that YAML does not have
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, 0, {}, set())
        return loader.construct_document(node)
    # PyYAML's constructors let through whatever int(), dates and dictionaries raise
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or repr(error)) from error
    finally:
        if loader is not None:
            loader.dispose()


def encode_yaml(values: Mapping[str, Any]) -> bytes:
    """A mapping as a file: keys in their order, one line each."""
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    return text.encode("utf-8")


def _size(node: yaml.Node, depth: int, sizes: dict[int, int], above: set[int]) -> int:
    """How many values a node is with its aliases written out; each node is looked at once."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise ValueError("a value that contains itself")
    if depth > DEPTH:
        raise ValueError(f"nested deeper than {DEPTH}")
    if id(node) not in sizes:
        below = list(node.value)
        if isinstance(node, yaml.MappingNode):
            below = [each for pair in below for each in pair]
        inside = above | {id(node)}
        sizes[id(node)] = 1 + sum(_size(each, depth + 1, sizes, inside) for each in below)
    if sizes[id(node)] > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES} values with its aliases written out")
    return sizes[id(node)]
