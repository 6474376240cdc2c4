"""The only wiring: one rank's part of a model, of a batch, and of what is added up.

Models, losses and training steps are written as for one device; what differs on many is handed to
them from here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from mindspore import Parameter, Tensor, nn

from mistral_ms.config import ModelConfig, ParallelConfig, Recompute, RoutingConfig
from mistral_ms.config.quantization import Quantization
from mistral_ms.errors import ConfigError, TopologyError
from mistral_ms.layers import CacheSpec, VocabParallelCrossEntropy
from mistral_ms.models import CausalLM, ModelChunk, NextTokenLogits, StageChunks
from mistral_ms.models.quantized import quantized_model
from mistral_ms.parallel.collectives import Groups
from mistral_ms.parallel.inference import ParallelLogits, ParallelNextTokenLogits
from mistral_ms.parallel.layer_factory import ParallelLayerFactory
from mistral_ms.parallel.pipeline import EXPLICIT_BACKWARD, Schedule, make_schedule
from mistral_ms.parallel.reduction import Reduction
from mistral_ms.parallel.stage import P2PCommunicator, model_chunks_of
from mistral_ms.parallel.storage import ParallelStorage, Storage
from mistral_ms.parallel.topology import GroupKind, Topology
from mistral_ms.parallel.zero1 import Zero1Reduction
from mistral_ms.weights import Specs

T = TypeVar("T")
POLL_SECONDS = 0.5
"""Between looks at what one rank does while the others wait."""


class ParallelContext:
    """A run's layout as one process sees it.

    ``mindspore.communication.init()`` must have been called, unless the world is one process.

    Args:
        parallel: the layout.
        rank: this process.
        world: how many there are; must be those of the layout.

    Raises:
        ConfigError: an impossible layout.
        TopologyError: another number of processes.
    """

    def __init__(self, parallel: ParallelConfig, rank: int = 0, world: int | None = None) -> None:
        self.parallel = parallel
        self.topology = Topology.of(parallel, world)
        self.groups = Groups(self.topology, rank)
        self.rank, self.world = rank, self.topology.sizes.world

    @property
    def is_rank_0(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def data_parallel(self) -> tuple[int, int]:
        """Which part of the batch this rank sees, and how many parts there are."""
        return self.groups.coords.dp, self.topology.sizes.dp

    def build_model(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        dtype: str = "float32",
        *,
        cache: CacheSpec | None = None,
        positions: int | None = None,
        quantization: Quantization | None = None,
    ) -> CausalLM:
        """This rank's part of the model, its weights zero, under the whole model's names.

        Args:
            config: the whole model.
            routing: the routing policy.
            dtype: dtype of weights and activations.
            cache: sizes of the key/value cache, of this rank's rows; None without.
            positions: see :class:`~mistral_ms.models.CausalLM`.
            quantization: how its experts stay quantised, in one process; None: they do not.

        Raises:
            ConfigError: the layout does not divide the model.
        """
        self.parallel.check(config)
        if self.world == 1:
            return quantized_model(
                config, routing, quantization, dtype, cache=cache, positions=positions
            )
        if self.parallel.pp_interleave_num > 1:
            raise ConfigError(
                "impossible stage",
                where="parallel.pp_interleave_num",
                value=self.parallel.pp_interleave_num,
                rule="interleaved chunks are for training alone",
                todo="generate with 1: checkpoints of any layout are read",
            )
        [model_chunk] = model_chunks_of(config, self.parallel.pp, self.groups.coords.pp)
        return self._part(config, routing, dtype, model_chunk, cache, positions)

    def build_stage(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        dtype: str = "float32",
        positions: int | None = None,
        quantization: Quantization | None = None,
    ) -> CausalLM | StageChunks:
        """The same for training, where a stage may hold several interleaved chunks.

        Args:
            config: the whole model.
            routing: the routing policy.
            dtype: dtype of weights and activations.
            positions: see :class:`~mistral_ms.models.CausalLM`.
            quantization: see :meth:`build_model`.

        Raises:
            ConfigError: the layout does not divide the model.
        """
        chunks = self.parallel.pp_interleave_num
        if chunks == 1:
            return self.build_model(
                config, routing, dtype, positions=positions, quantization=quantization
            )
        self.parallel.check(config)
        held = model_chunks_of(config, self.parallel.pp, self.groups.coords.pp, chunks)
        return StageChunks(
            [self._part(config, routing, dtype, each, None, positions) for each in held]
        )

    def _part(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        dtype: str,
        model_chunk: ModelChunk,
        cache: CacheSpec | None = None,
        positions: int | None = None,
    ) -> CausalLM:
        return CausalLM(
            config,
            routing,
            cache=cache,
            dtype=dtype,
            positions=positions,
            layer_factory=ParallelLayerFactory(
                config, routing, self.parallel, self.groups, dtype, cache
            ),
            model_chunk=model_chunk,
        )

    def next_token(self, model: CausalLM, dtype: str = "float32") -> nn.Cell:
        """What generation needs of a part with a cache: everybody's logits, on every rank.

        Args:
            model: made by :meth:`build_model`.
            dtype: of its activations.
        """
        if self.world == 1:
            return NextTokenLogits(model)
        return ParallelNextTokenLogits(model, self.groups, dtype)

    def logits(self, model: CausalLM, dtype: str = "float32") -> nn.Cell:
        """The logits after some tokens of this rank's sequences; see ParallelLogits.

        Args:
            model: made by :meth:`build_model`.
            dtype: of its activations.
        """
        return ParallelLogits(model, self.groups, dtype)

    def token_nll(self, config: ModelConfig) -> nn.Cell | None:
        """The loss of logits that are divided along the vocabulary; None when they are not."""
        tensor = self.groups.of(GroupKind.TENSOR)
        return None if tensor.size == 1 else VocabParallelCrossEntropy(tensor, config.vocab_size)

    def reduction(self, weights: Mapping[str, Parameter], specs: Specs) -> Reduction | None:
        """What is added up at the end of a step; None for one process.

        Args:
            weights: what this rank trains, by name.
            specs: of these weights, and of others.

        Raises:
            ConfigError: an optimizer that cannot be divided among so many.
        """
        if self.world == 1:
            return None
        kind = Zero1Reduction if self.parallel.optimizer_parallel else Reduction
        return kind(weights, self.groups, specs)

    @property
    def is_pipelined(self) -> bool:
        """Whether batches pass several stages."""
        return self.parallel.pp > 1

    @property
    def recompute(self) -> Recompute:
        """What the gradient of one micro-batch computes again. A stage of a pipeline computes its
        whole forward pass again in any case, ``full`` adds no second time to that.
        """
        amount = self.parallel.recompute
        return "selective" if amount == "full" and self.is_pipelined else amount

    def schedule(self, micro_batches: int) -> Schedule:
        """Which stage works on which of so many micro-batches when."""
        parallel = self.parallel
        chunks = parallel.pp_interleave_num
        return make_schedule(
            parallel.pipeline_scheduler,
            parallel.pp,
            micro_batches,
            backward=EXPLICIT_BACKWARD,
            chunks=chunks,
        )

    def p2p(self) -> P2PCommunicator:
        """The ways to the stages beside this rank's own."""
        return P2PCommunicator(self.groups, self.parallel.pp_interleave_num)

    def storage(self, specs: Specs) -> Storage:
        """How this rank's part of a model lies in a checkpoint.

        Args:
            specs: of what the rank's stage holds.
        """
        if self.world == 1:
            return Storage(specs)
        return ParallelStorage(specs, self.topology, self.rank, self.parallel.optimizer_parallel)

    def initialize(self, model: CausalLM | StageChunks, seed: int) -> None:
        """Draws what one process would draw, and keeps this rank's parts."""
        self.storage(model.specs).initialize(model.weights(), seed)
        model.begin_adapters()

    def sum_over_stages(self, values: np.ndarray) -> np.ndarray:
        """Sums over the stages of what all ranks of a stage have alike; all must ask.

        Args:
            values: float32.
        """
        if self.world == 1:
            return values
        coords = self.groups.coords
        mine = values if coords.dp == 0 and coords.mp == 0 else np.zeros_like(values)
        return self.sum_over_ranks(mine)

    def sum_over_ranks(self, values: np.ndarray) -> np.ndarray:
        """Sums over all ranks; all must ask.

        Args:
            values: float32.
        """
        if self.world == 1:
            return values
        return self.groups.of(GroupKind.WORLD).all_reduce(Tensor(values)).asnumpy()

    def gather_from_ranks(self, values: np.ndarray) -> np.ndarray:
        """The values of every rank, [world, ...], to the bit; all must ask.

        Args:
            values: float64, of the same shape on all ranks. They travel as integers of 16 bits,
                which float32 holds exactly: float32 is all that groups add up.
        """
        if self.world == 1:
            return values[None]
        words = np.ascontiguousarray(values, np.float64).view(np.uint16)
        slots = np.zeros((self.world, *words.shape), np.float32)
        slots[self.rank] = words
        return self.sum_over_ranks(slots).astype(np.uint16).view(np.float64)

    def gather_outputs(self, values: np.ndarray) -> np.ndarray:
        """The same of what is alike on the ranks of a tensor-parallel group: zeros of all but its
        first one.
        """
        speaks = self.groups.coords.mp == 0
        return self.gather_from_ranks(values if speaks else np.zeros_like(values))

    def any_rank(self, yes: bool) -> bool:
        """Whether any process says yes; all get the same answer, and all must ask."""
        if self.world == 1:
            return yes
        vote = Tensor(np.array([float(yes)], np.float32))
        return bool(self.groups.of(GroupKind.WORLD).all_reduce(vote).asnumpy()[0] > 0)

    def broadcast(self, number: int) -> int:
        """The first rank's number (0 to 2**24); all must ask."""
        if self.world == 1:
            return number
        sent = Tensor(np.array([float(number if self.is_rank_0 else 0)], np.float32))
        return int(self.groups.of(GroupKind.WORLD).all_reduce(sent).asnumpy()[0])

    def gather_from_stages(
        self, held: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        """What the stages hold, for everybody; all must ask.

        Args:
            held: float32, whole; what the ranks of one stage hold is the same.
            shapes: of everything that is wanted; each must be on exactly one stage.
        """
        if self.world == 1:
            return {name: held[name] for name in shapes}
        coords, world = self.groups.coords, self.groups.of(GroupKind.WORLD)
        answers = coords.dp == 0 and coords.mp == 0
        found = {}
        for name, shape in shapes.items():
            part = held[name] if answers and name in held else np.zeros(shape, np.float32)
            found[name] = world.all_reduce(Tensor(part)).asnumpy()
        return found

    def on_rank_0(self, work: Callable[[], T]) -> T | None:
        """What ``work`` returns, on the first rank; None on the others.

        They wait for it however long it takes, which no single collective operation does.

        Raises:
            TopologyError: on the others, when it failed on the first.
        """
        if self.world == 1:
            return work()
        with ThreadPoolExecutor(1) as threads:
            future = threads.submit(work) if self.is_rank_0 else None
            while self.any_rank(future is not None and not future.done()):
                time.sleep(POLL_SECONDS)
            failed = self.any_rank(future is not None and future.exception() is not None)
        if future is not None:
            return future.result()
        if failed:
            raise TopologyError("the first rank has failed", todo="see its log")
        return None

    def barrier(self) -> None:
        """Returns when every process has come here."""
        self.any_rank(False)
