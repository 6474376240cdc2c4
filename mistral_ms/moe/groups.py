"""Groups of neighbouring experts, such as those of a device, among which tokens choose first."""

from __future__ import annotations

from mindspore import Tensor, ops

from mistral_ms.errors import ConfigError
from mistral_ms.ops.reference.scoring import spread

_sum_keep = ops.ReduceSum(keep_dims=True)


def check_groups(experts: int, top_k: int, groups: int, chosen: int, best: int = 1) -> None:
    """Raises where experts cannot be chosen so.

    Args:
        experts: E.
        top_k: K.
        groups: into which the experts are divided.
        chosen: groups that a token's experts are of.
        best: experts that a group is judged by.

    Raises:
        ConfigError: names the rule.
    """
    if (
        experts % groups
        or chosen > groups
        or (groups > 1 and experts // groups < best)
        or chosen * experts // groups < top_k
    ):
        least = " of at least two" if best == 2 else ""
        raise ConfigError(
            "impossible groups of experts",
            where="model.moe.gate",
            value=f"n_group {groups}, topk_group {chosen}",
            rule=f"{experts} experts in equal groups{least}, and {top_k} of them in the chosen "
            "groups",
        )


def sums_of_groups(values_TE: Tensor, groups: int) -> Tensor:
    """The sum over each expert's group, at the place of every expert: [T, E]."""
    T, E = values_TE.shape
    return spread(_sum_keep(values_TE.reshape(T, groups, E // groups), -1), E)
