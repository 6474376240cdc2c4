"""The names of all-to-all routes, and what each asks of a layout.

The routes themselves stand in ``mistral_ms.parallel.dispatchers`` under the same names; see
:mod:`mistral_ms.config.extensions` for how those of other modules are found.
"""

from __future__ import annotations

from mistral_ms.config.extensions import import_extensions
from mistral_ms.config.layout import LayoutRule, Sizes
from mistral_ms.config.names import perhaps

_RULES: dict[str, LayoutRule] = {}


def any_layout(sizes: Sizes, devices_per_node: int) -> str | None:
    """The rule of a route that can be taken in every layout."""
    return None


def even_hops(sizes: Sizes, devices_per_node: int) -> str | None:
    """The rule of the hierarchical route: expert groups lie evenly on the nodes."""
    devices, span = devices_per_node, sizes.ep * sizes.mp
    if sizes.world <= devices or devices % span == 0:
        return None
    if span % devices == 0 and devices % sizes.mp == 0:
        return None
    return (
        f"a hierarchical all-to-all needs ep * mp ({sizes.ep} * {sizes.mp} = {span}) to "
        f"divide devices_per_node ({devices}), or to be a multiple of it with mp dividing it"
    )


def register_route_name(name: str, rule: LayoutRule = any_layout) -> None:
    """Makes a value of ``parallel.all_to_all`` known.

    Args:
        name: the value.
        rule: what the route asks of a layout.

    Raises:
        ValueError: another route has the name.
    """
    if _RULES.get(name, rule) is not rule:
        raise ValueError(f"all-to-all route {name} is registered twice")
    _RULES[name] = rule


def route_rule(name: str) -> LayoutRule:
    """What a route asks of a layout.

    Raises:
        ValueError: there is no such route.
    """
    if name not in _RULES:
        import_extensions()
    if name not in _RULES:
        advice = perhaps(name, _RULES)
        if name == "group_wise":
            advice = "group_wise_a2a: true has each tensor-parallel rank carry a shard of every row"
        rule = f"all_to_all must be one of {', '.join(sorted(_RULES))}"
        raise ValueError("; ".join(filter(None, [rule, advice])))
    return _RULES[name]


register_route_name("flat")
register_route_name("hierarchical", even_hops)
