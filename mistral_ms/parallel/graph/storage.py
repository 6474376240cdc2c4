"""How a rank's parts of the graph's weights lie in a checkpoint.

Two things differ from the explicit path: experts are matrices [E * H, I] (w1 and w3 transposed),
and optimizer parallelism leaves each rank a share of the rows of its part, in the order of the
ranks that hold the same part: the order in which an AllGather puts their shares together.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from mindspore import Parameter

from mistral_ms.config import ModelConfig, ParallelConfig
from mistral_ms.parallel.pipeline import stages_of
from mistral_ms.parallel.sharding import Sharding, layout_of
from mistral_ms.parallel.storage import Shape, Storage, Window

_TRANSPOSED = (".experts.w1", ".experts.w3")


def _is_expert(name: str) -> bool:
    return ".experts." in name


class GraphStorage(Storage):
    """Of one rank of the auto-parallel graph.

    Args:
        model: the architecture.
        parallel: the layout.
        rank: the process.
        layouts: of weights that do not have their layout of training, by their names.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        rank: int = 0,
        layouts: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.sharding = model, Sharding(parallel)
        self.layouts = layouts or {}
        self.shared_out = parallel.optimizer_parallel
        self.stage, self.number = divmod(rank, self.sharding.ranks)
        self.holds_everything = parallel.world == 1
        layers = next(s.layers for s in stages_of(model, parallel.pp) if s.number == self.stage)
        self.prefixes = tuple(f"layers.{layer}." for layer in layers)
        if self.stage == 0:
            self.prefixes = ("embed_tokens.", *self.prefixes)
        if self.stage == parallel.pp - 1:
            self.prefixes = (*self.prefixes, "norm.", "lm_head.")

    def holds(self, name: str) -> bool:
        """Whether a weight, or anything whose name begins like one, is of this rank's stage."""
        return name.startswith(self.prefixes)

    def held(self, weights: Mapping[str, Parameter]) -> dict[str, Parameter]:
        """Of the whole model's weights those of this rank's stage."""
        return {name: each for name, each in weights.items() if self.holds(name)}

    def whole(self, name: str, parameter: Parameter) -> Shape:
        """See the base; asks the architecture, because a compiled graph's parameters are parts."""
        model, D = self.model, self.model.head_size
        H, I = model.hidden_size, model.intermediate_size  # noqa: E741
        experts = 0 if model.moe is None else model.moe.num_local_experts
        shapes = {
            "embed_tokens.weight": (model.vocab_size, H),
            "lm_head.weight": (model.vocab_size, H),
            "q_proj.weight": (model.num_attention_heads * D, H),
            "k_proj.weight": (model.num_key_value_heads * D, H),
            "v_proj.weight": (model.num_key_value_heads * D, H),
            "o_proj.weight": (H, model.num_attention_heads * D),
            "feed_forward.w1.weight": (I, H),
            "feed_forward.w3.weight": (I, H),
            "feed_forward.w2.weight": (H, I),
            "experts.w1": (experts, I, H),
            "experts.w3": (experts, I, H),
            "experts.w2": (experts, H, I),
            "router.weight": (experts, H),
            "norm.weight": (H,),
        }
        return next(shape for end, shape in shapes.items() if name.endswith(end))

    def window(self, name: str, shape: Shape) -> Window:
        """See the base."""
        layout = self._layout_of(name)
        matrix = self._matrix(name, shape)
        sizes, places = self.sharding.part(layout, matrix), self.sharding.place(layout, self.number)
        starts = [place * size for place, size in zip(places, sizes, strict=True)]
        copies = self.sharding.shares(layout, matrix, self.shared_out)
        rows, first = sizes[0] // copies, starts[0]
        if copies > 1:
            first += self.sharding.copy_number(layout, self.number) * rows
        cut = [slice(first, first + rows)]
        cut += [slice(a, a + n) for a, n in zip(starts[1:], sizes[1:], strict=True)]
        return self._of_experts(name, cut) if _is_expert(name) else tuple(cut)

    def _layout_of(self, name: str) -> str:
        return self.layouts.get(name) or layout_of(name)

    def _matrix(self, name: str, shape: Shape) -> Shape:
        """The shape of the whole weight in the graph."""
        if not _is_expert(name):
            return shape
        return shape[0] * self.model.hidden_size, self.model.intermediate_size

    def _of_experts(self, name: str, cut: list[slice]) -> Window:
        """From rows of [E * H, I] to a rectangle of the checkpoint's three axes."""
        H, (rows, columns) = self.model.hidden_size, cut
        if rows.stop - rows.start < H:  # a share of one expert's rows
            expert = rows.start // H
            experts = slice(expert, expert + 1)
            hidden = slice(rows.start - expert * H, rows.stop - expert * H)
        else:
            experts, hidden = slice(rows.start // H, rows.stop // H), slice(0, H)
        if name.endswith(_TRANSPOSED):
            return experts, columns, hidden
        return experts, hidden, columns

    def parameter_shape(self, name: str, held: Shape) -> Shape:
        """See the base."""
        if not _is_expert(name):
            return held
        experts, rows, columns = held
        if name.endswith(_TRANSPOSED):
            rows, columns = columns, rows
        return experts * rows, columns

    def to_parameter(self, name: str, values: np.ndarray) -> np.ndarray:
        """See the base."""
        if name.endswith(_TRANSPOSED):
            values = values.transpose(0, 2, 1)
        return values.reshape(-1, values.shape[-1]) if _is_expert(name) else values

    def from_parameter(self, name: str, values: np.ndarray) -> np.ndarray:
        """See the base."""
        if not _is_expert(name):
            return values
        rows = min(values.shape[0], self.model.hidden_size)
        values = values.reshape(-1, rows, values.shape[-1])
        return values.transpose(0, 2, 1) if name.endswith(_TRANSPOSED) else values

    def written(self, weights: Mapping[str, Shape]) -> set[str]:
        """See the base: shares are nobody else's; of copies the first rank writes."""

        def mine(name: str, shape: Shape) -> bool:
            layout = self._layout_of(name)
            copies = self.sharding.shares(layout, self._matrix(name, shape), self.shared_out)
            return copies > 1 or self.sharding.copy_number(layout, self.number) == 0

        return {name for name, shape in weights.items() if mine(name, shape)}
