"""The causal language model: one decoder serves Mistral (dense) and Mixtral (sparse).

Inputs are token ids and positions of equal shape [B, S]. Position -1 marks padding: it is never
attended to, never routed, never counted, wherever in the batch it stands.
"""

from __future__ import annotations

from collections.abc import Mapping

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mistral_ms.config import DROPLESS, ModelConfig, RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.layers import (
    AttentionContext,
    CacheSpec,
    OutputLogits,
    Packing,
    RotaryTable,
    is_buffer,
    output_logits,
    visible_keys,
)
from mistral_ms.models.adapters import insert_adapters, set_magnitudes
from mistral_ms.models.block import DecoderBlock
from mistral_ms.models.layer_factory import LayerFactory
from mistral_ms.models.model_chunk import ModelChunk
from mistral_ms.moe import (
    RouterSums,
    check_domains_known,
    gate_context,
    gate_ids,
    stack_sums,
    update_gates,
)
from mistral_ms.weights import Specs, by_name, check_parameters, init_values, specs

_gather = ops.Gather()
_range = ops.Range()


class CausalLM(nn.Cell):
    """Mistral or Mixtral, by its configuration.

    Args:
        config: the architecture.
        routing: the routing policy of the sparse layers.
        cache: sizes of the key/value cache; None computes whole sequences.
        dtype: dtype of weights and activations; on CPU "float32", or "bfloat16" for weights alone
            in generation (:func:`mistral_ms.ops.select_cpu.activations`).
        positions: rows of the rotary tables; the model's max_position_embeddings when None.
        layer_factory: makes the pieces; those of one device when None. A maker knows its own dtype,
            routing and cache, which must then be these.
        model_chunk: the run of layers that this is; the whole model when None. What it does not
            hold does not exist: without the embedding it is given hidden states instead of tokens.

    Attributes:
        specs: what is true of each of its parameters as wholes, by name.
        weight_dtype: dtype of the weights.
        quantization: how the experts are quantised in memory; None: they are not.

    Raises:
        ConfigError: in generation experts that choose tokens, or that know domains.
        WeightError: its pieces have other parameters than the specifications describe.
    """

    def __init__(
        self,
        config: ModelConfig,
        routing: RoutingConfig = DROPLESS,
        *,
        cache: CacheSpec | None = None,
        dtype: str = "float32",
        positions: int | None = None,
        layer_factory: LayerFactory | None = None,
        model_chunk: ModelChunk | None = None,
    ) -> None:
        super().__init__()
        self.config, self.routing, self.weight_dtype = config, routing, dtype
        self.model_chunk = ModelChunk.whole(config) if model_chunk is None else model_chunk
        layer_factory = (
            LayerFactory(config, routing, cache, dtype) if layer_factory is None else layer_factory
        )
        self.quantization = layer_factory.quantization
        self.tied = config.tie_word_embeddings
        if self.model_chunk.embeds or (self.tied and self.model_chunk.predicts):
            self.embed_tokens = layer_factory.embedding()
        self.layers = nn.CellList(
            [DecoderBlock(layer_factory, layer) for layer in self.model_chunk.layers]
        )
        self.predicts = self.model_chunk.predicts
        if self.predicts:
            self.norm = layer_factory.norm()
            if not self.tied:
                self.lm_head = layer_factory.head()
        rows = config.max_position_embeddings if positions is None else positions
        self.rotary = RotaryTable(config, rows)
        self.windows = config.windows
        self.sparse = any(layer.sparse for layer in self.layers)
        if cache is not None and self.sparse and routing.policy == "experts_choose":
            raise ConfigError(
                "impossible routing",
                where="routing.policy",
                value="experts_choose with a cache",
                rule="experts choose among all tokens of a batch; in generation later ones are not "
                "there yet",
                todo="generate dropless: tokens choose their experts by the same gate",
            )
        self.takes_ids = config.moe is not None and config.moe.gate.takes_ids
        self.row_domains = 1 if config.moe is None else config.moe.gate.row_domains
        self.cached = cache is not None
        if cache is not None:
            check_domains_known(self.row_domains)
            self.key_positions = layer_factory.key_positions(cache)
        self.specs = by_name(filter(self.model_chunk.holds, specs(config)))
        insert_adapters(self.layers, self.model_chunk, self.specs, config, layer_factory)
        check_weights(self.weights(), self.specs, layer_factory)

    def construct(self, ids_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Logits [B, S, V] in float32 of int32 ids and positions [B, S]."""
        hidden_TH = self.hidden_states(ids_BS, positions_BS)[0]
        return output_logits(hidden_TH, self.head_weight()).reshape(*ids_BS.shape, -1)

    def hidden_states(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor | None = None,
        random_B3: Tensor | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, RouterSums | None]:
        """Normalised hidden states [B * S, H] and the router sums of the sparse layers.

        Args:
            ids_BS: int32 tokens; of a packed batch [P], and so are the states [P, H].
            positions_BS: int32, -1 for padding.
            segments_BS: int32; tokens of different segments do not see each other. Not with a
                cache.
            random_B3: int32, for each row the seed, the step and the row's number in the global
                batch; what a gate draws from in training. None outside of training. A fourth
                column has the domains of the rows, where the data have any.
            packing: where the tokens of a packed batch stand; None: it is not packed.

        Returns:
            The states, and the sums stacked over the sparse layers, [layers, E] and [layers];
            None for a dense model.
        """
        x_TH = self.embed(ids_BS)
        return self.decode(x_TH, positions_BS, segments_BS, random_B3, ids_BS, packing)

    def embed(self, ids_BS: Tensor) -> Tensor:
        """[B * S, H] of int32 tokens."""
        return self.embed_tokens(ids_BS.reshape(-1))

    def decode(
        self,
        x_TH: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor | None = None,
        random_B3: Tensor | None = None,
        ids_BS: Tensor | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, RouterSums | None]:
        """From embedded tokens, or what the model chunk before gave, to the result of the last
        layer that is held, normalised where it is the model's last; and the router sums as above.
        The ids are for gates that take them.
        """
        contexts = self.attention_contexts(positions_BS, segments_BS, packing)
        valid_T = ops.cast(positions_BS.reshape(-1) >= 0, ms.float32)
        if packing is not None:
            valid_T = _gather(valid_T, packing[0], 0)
        columns = positions_BS.shape[1]
        context = None if random_B3 is None else gate_context(random_B3, columns)
        ids_T = None
        if self.takes_ids and ids_BS is not None:
            ids_T = gate_ids(ids_BS, random_B3, self.row_domains, self.config.vocab_size)
        found: tuple[RouterSums, ...] = ()
        for layer in self.layers:
            x_TH, sums = layer(x_TH, contexts[layer.window], valid_T, context, ids_T, columns)
            if layer.sparse:
                found = (*found, sums)
        if self.predicts:
            x_TH = self.norm(x_TH)
        if not self.sparse:
            return x_TH, None
        return x_TH, stack_sums(found)

    def attention_contexts(
        self,
        positions_BS: Tensor,
        segments_BS: Tensor | None = None,
        packing: Packing | None = None,
    ) -> tuple[AttentionContext, ...]:
        """What layers share, for each of the model's ``windows``: rotary rows, visibility, rows
        in the cache, and in a packed batch.
        """
        cos, sin = self.rotary(positions_BS)
        rows, keys_BM = None, positions_BS
        if self.cached:
            rows, keys_BM = self.key_positions(positions_BS)
        visible = visible_keys(positions_BS, keys_BM, self.windows[0], segments_BS)
        first = cos, sin, visible, rows, packing
        if len(self.windows) == 1:
            return (first,)
        visible = visible_keys(positions_BS, keys_BM, self.windows[1], segments_BS)
        return first, (cos, sin, visible, rows, packing)

    def head_weight(self) -> ms.Parameter:
        """The output head [V, H]; the embedding's own weight when tied."""
        return self.embed_tokens.weight if self.tied else self.lm_head.weight

    def reset_cache(self) -> None:
        """Forgets all cached positions; the next call starts new sequences."""
        self.key_positions.reset()

    def clear_cache(self) -> None:
        """Resets and zeroes the cache; needed after logits that were not finite."""
        self.reset_cache()
        for layer in self.layers:
            layer.attention.cache.clear()

    def weights(self) -> dict[str, ms.Parameter]:
        """All weights, frozen ones too, by the names that our checkpoints use; those of a model
        chunk by their names in the whole model.
        """
        name = self.model_chunk.name_in_model
        return {name(n): p for n, p in self.parameters_and_names() if not is_buffer(p)}

    def stored_weights(self) -> dict[str, ms.Parameter]:
        """What checkpoints hold of :meth:`weights`: with adapters, these alone."""
        weights = self.weights()
        if self.config.lora is None:
            return weights
        adapters = {name for name, spec in self.specs.items() if spec.adapts}
        return {name: each for name, each in weights.items() if name in adapters}

    def update_gates(self, routed_LE: np.ndarray) -> None:
        """Moves the state of all gates on, after an update of the weights.

        Args:
            routed_LE: choices of each expert in every sparse layer of the whole model, before the
                capacity, of the whole batch.
        """
        if self.config.lora is not None:
            return  # the base stays as it is
        layers = dict(zip(self.model_chunk.layers, self.layers, strict=True))
        update_gates(layers, self.config.sparse_layers, routed_LE)

    def initialize(self, seed: int) -> None:
        """Draws fresh weights as their specifications say; a function of the seed."""
        self._draw(self.weights(), seed)

    def initialize_adapters(self, seed: int) -> None:
        """The same for the adapters alone, of a model whose other weights are there."""
        self._draw(self.stored_weights(), seed)

    def _draw(self, weights: Mapping[str, ms.Parameter], seed: int) -> None:
        for name, parameter in weights.items():
            values = init_values(self.specs[name], seed)
            parameter.set_data(Tensor(values).astype(parameter.dtype))
        self.begin_adapters()

    def begin_adapters(self) -> None:
        """Gives adapters that decompose weights the magnitudes with which the model is as without
        them; to be called when everything else has its first values.
        """
        set_magnitudes(self.layers, self.model_chunk, self.weights(), self.specs)


def check_weights(
    weights: Mapping[str, ms.Parameter], specs: Specs, layer_factory: LayerFactory
) -> None:
    """Compares a model's parameters with their specifications; only trained ones get gradients.

    Args:
        weights: the model's parameters, by the names of checkpoints.
        specs: of what the model holds.
        layer_factory: made the model.

    Raises:
        WeightError: another set of names, or other shapes.
    """
    held = {name: tuple(parameter.shape) for name, parameter in weights.items()}
    expected: dict[str, tuple[int, ...]] = {}
    for spec in specs.values():
        expected |= layer_factory.held_parameters(spec)
    check_parameters(held, expected)
    for name, spec in specs.items():
        if spec.kind != "trained":
            weights[name].requires_grad = False


class NextTokenLogits(nn.Cell):
    """Logits of one position per sequence: what generation needs of a cached model.

    Args:
        model: a model with a cache.

    Attributes:
        batch: rows that it takes.
        packs: whether it takes packed batches.

    Raises:
        ConfigError: the model has no cache.
    """

    packs = True

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        if not model.cached:
            raise ConfigError("model without a cache", rule="generation needs CausalLM(cache=...)")
        self.model = model
        self.batch = model.key_positions.spec.batch
        self.logits = OutputLogits(model.weight_dtype)

    def construct(
        self,
        ids_BS: Tensor,
        positions_BS: Tensor,
        last_B: Tensor,
        rows_P: Tensor | None = None,
        places_T: Tensor | None = None,
    ) -> Tensor:
        """Float32 [B, V]: logits after some column of each row.

        Args:
            ids_BS: int32 tokens; of a packed batch those [P] that are computed.
            positions_BS: int32, -1 for padding.
            last_B: int32, the columns.
            rows_P: see :data:`~mistral_ms.layers.Packing`; a packed batch with less than P tokens
                is filled up with padding.
            places_T: likewise.
        """
        B, S = positions_BS.shape
        rows_B = last_B + _range(0, B, 1) * S
        if rows_P is None or places_T is None:
            hidden_TH = self.model.hidden_states(ids_BS, positions_BS)[0]
        else:
            packing = rows_P, places_T
            hidden_TH = self.model.hidden_states(ids_BS, positions_BS, packing=packing)[0]
            rows_B = ops.minimum(_gather(places_T, rows_B, 0), ids_BS.shape[0] - 1)
        return self.logits(_gather(hidden_TH, rows_B, 0), self.model.head_weight())
