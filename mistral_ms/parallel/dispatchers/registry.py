"""The routes by the values of ``parallel.all_to_all``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from mindspore import nn

from mistral_ms.config import any_layout, even_hops, register_route_name
from mistral_ms.config.layout import LayoutRule
from mistral_ms.errors import ConfigError
from mistral_ms.parallel.collectives import Collectives, Groups
from mistral_ms.parallel.dispatchers.routes import FlatRoute, HierarchicalRoute, Route
from mistral_ms.parallel.dispatchers.variable_routes import (
    FlatVariableRoute,
    HierarchicalVariableRoute,
    VariableRoute,
)
from mistral_ms.parallel.topology import GroupKind

Exchange: TypeAlias = Callable[[Collectives], nn.Cell]
"""Makes the all-to-all of equal parts of a group."""


@dataclass(frozen=True)
class RouteKind:
    """How the routes of one kind are made.

    Attributes:
        name: the value of ``parallel.all_to_all``.
        equal: from a rank's groups and an exchange to the route of equal numbers of rows.
        variable: from a rank's groups to the one of exact numbers; None where there is none.
    """

    name: str
    equal: Callable[[Groups, Exchange], Route]
    variable: Callable[[Groups], VariableRoute] | None = None

    def make_variable(self, groups: Groups) -> VariableRoute:
        """The route of exact numbers of rows.

        Raises:
            ConfigError: there is none.
        """
        if self.variable is None:
            raise ConfigError(
                "not known for exact numbers of rows",
                where="parallel.all_to_all",
                value=f"{self.name} with routing.policy=dropless",
                rule="this route exchanges equal numbers of rows",
                todo="use routing.policy=capacity, or all_to_all=flat",
            )
        return self.variable(groups)


_KINDS: dict[str, RouteKind] = {}


def register_route(
    name: str,
    equal: Callable[[Groups, Exchange], Route],
    variable: Callable[[Groups], VariableRoute] | None = None,
    rule: LayoutRule = any_layout,
) -> None:
    """Makes a value of ``parallel.all_to_all`` known.

    Args:
        name: the value.
        equal: see :class:`RouteKind`.
        variable: likewise.
        rule: what the route asks of a layout.

    Raises:
        ValueError: another route has the name.
    """
    if name in _KINDS:
        raise ValueError(f"all-to-all route {name} is registered twice")
    register_route_name(name, rule)
    _KINDS[name] = RouteKind(name, equal, variable)


def route_kind(name: str) -> RouteKind:
    """The route of a value of ``parallel.all_to_all``."""
    return _KINDS[name]


def _hops(groups: Groups) -> tuple[Collectives, Collectives]:
    return groups.of(GroupKind.EXPERT_NODE), groups.of(GroupKind.EXPERT_CROSS)


register_route(
    "flat",
    lambda groups, exchange: FlatRoute(groups.of(GroupKind.EXPERT), exchange),
    lambda groups: FlatVariableRoute(groups.of(GroupKind.EXPERT)),
)
register_route(
    "hierarchical",
    lambda groups, exchange: HierarchicalRoute(*_hops(groups), exchange),
    lambda groups: HierarchicalVariableRoute(*_hops(groups)),
    rule=even_hops,
)
