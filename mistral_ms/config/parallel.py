"""How a run is divided among processes."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, model_validator

from mistral_ms.config.base import Frozen, validate
from mistral_ms.config.layout import Rules, Sizes, advice, check_layout
from mistral_ms.config.model import ModelConfig
from mistral_ms.config.routes import route_rule
from mistral_ms.errors import ConfigError

Recompute: TypeAlias = Literal["none", "selective", "full"]
"""``selective``: norms and the core of attention, so that attention probabilities are never kept;
``full``: whole decoder blocks, their collectives included."""


class ParallelConfig(Frozen):
    """A layout of dp * mp * pp processes. The default is one process.

    The rank order has pp outermost, then dp, then mp: consecutive ranks are tensor-parallel.
    Experts are shared by ep consecutive data-parallel ranks of one stage with the same
    tensor-parallel rank; there are dp / ep replicas of every expert.

    Attributes:
        dp: data-parallel replicas of the dense model.
        mp: tensor parallelism: shards of every matrix, of every expert along intermediate_size.
        pp: pipeline stages.
        ep: expert parallelism; divides dp and num_local_experts.
        devices_per_node: processes on one machine; ranks fill one node after the other.
        pipeline_scheduler: order of the micro-batches in the pipeline.
        pp_interleave_num: runs of layers on each stage, whose micro-batches 1f1b interleaves
            (MindFormers' key; Megatron's virtual pipeline): a smaller bubble for more messages.
            Of explicit collectives alone; micro-batches must be a multiple of pp.
        optimizer_parallel: each data-parallel rank keeps its shard of the optimizer's state.
        all_to_all: how token rows travel between the ranks of an expert group: ``flat`` directly;
            ``hierarchical`` inside the node, then between equal local ranks of the nodes; or
            another route that a module has registered.
        group_wise_a2a: each tensor-parallel rank carries a shard of every row, which is then
            gathered within the tensor group (MindFormers' key); otherwise whole rows.
        recompute: what the backward pass computes again instead of keeping it: ``selective`` the
            core of attention and norms, ``full`` whole decoder blocks. A pipeline of explicit
            collectives computes the forward pass of every stage again in any case.
        execution: who divides a training: ``explicit`` collectives of ours, on CPU and Ascend, or
            MindSpore, one auto-parallel ``graph`` on Ascend (of one process on any device);
            ``auto`` is ``graph`` on Ascend and ``explicit`` elsewhere.
        max_device_memory: GiB of a device (MindFormers' key); `train` warns of a run that seems to
            need more. None: 64 on Ascend, no limit elsewhere.
        micro_batch_interleave_num: parts of a micro-batch whose communication and computation may
            overlap.
    """

    dp: int = Field(default=1, ge=1)
    mp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    ep: int = Field(default=1, ge=1)
    devices_per_node: int = Field(default=8, ge=1)
    pipeline_scheduler: Literal["gpipe", "1f1b"] = "1f1b"
    pp_interleave_num: int = Field(default=1, ge=1)
    optimizer_parallel: bool = False
    all_to_all: str = "flat"
    group_wise_a2a: bool = False
    recompute: Recompute = "none"
    execution: Literal["auto", "explicit", "graph"] = "auto"
    max_device_memory: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    micro_batch_interleave_num: Literal[1, 2] = 1

    @model_validator(mode="after")
    def _possible(self) -> ParallelConfig:
        rules = self.rules()
        if rule := rules.broken_by(self.sizes):
            raise ValueError(f"{rule}: {advice(self.sizes, rules)}")
        if self.pp_interleave_num > 1 and (self.pp == 1 or self.pipeline_scheduler != "1f1b"):
            raise ValueError(
                f"pp_interleave_num ({self.pp_interleave_num}) interleaves the chunks of several "
                "stages under pipeline_scheduler 1f1b. Set it to 1, or pp above 1"
            )
        return self

    @property
    def sizes(self) -> Sizes:
        """The four sizes alone."""
        return Sizes(self.dp, self.mp, self.pp, self.ep)

    def execution_on(self, device: str) -> Literal["explicit", "graph"]:
        """Who divides a training on a device ("Ascend", "CPU")."""
        if self.execution == "auto":
            return "graph" if device == "Ascend" else "explicit"
        return self.execution

    @property
    def world(self) -> int:
        """Processes in all: dp * mp * pp."""
        return self.sizes.world

    def rules(self, world: int | None = None, model: ModelConfig | None = None) -> Rules:
        """What the sizes must fit, beside the rest of this configuration.

        Args:
            world: processes that are there; None = as many as the layout has.
            model: the model to divide; None = any.
        """
        return Rules(
            world=world,
            devices_per_node=self.devices_per_node,
            route=route_rule(self.all_to_all),
            sharded_rows=self.group_wise_a2a,
            model=model,
        )

    def check(self, model: ModelConfig, world: int | None = None) -> None:
        """Raises if this layout cannot divide ``model`` among ``world`` processes.

        Raises:
            ConfigError: names the rule, the layout and the nearest legal layouts.
        """
        check_layout(self.sizes, self.rules(world, model), ConfigError, "parallel")


def layout_from_flags(
    dp: int, mp: int, pp: int, ep: int, execution: str = "auto"
) -> ParallelConfig:
    """The layout of a command without a run file. All tokens travel directly, so where one machine
    ends and the next begins does not matter.

    Raises:
        ConfigError: an impossible one.
    """
    sizes = {"dp": dp, "mp": mp, "pp": pp, "ep": ep}
    nodes = {"devices_per_node": max(1, dp * mp * pp)}
    return validate(ParallelConfig, {**sizes, **nodes, "execution": execution}, "flags")
