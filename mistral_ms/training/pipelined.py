"""The gradients of a batch whose micro-batches pass several stages.

A stage keeps what it was given of each micro-batch that is under way, nothing else: its backward
step computes the forward pass again. The order of the steps and of the messages between them is a
table (:mod:`mistral_ms.parallel.pipeline`); both schedules run the backward steps in the order of
the micro-batches, so gradients are added up as in one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mistral_ms.models import Objective
from mistral_ms.parallel.pipeline import Phase, Schedule, Transfer, program
from mistral_ms.parallel.stage import P2PCommunicator
from mistral_ms.training.graphs import BatchTensors, added_up, gradient_sums, to_float32

_cast = ops.Cast()
_sum = ops.ReduceSum()


class StageForward(nn.Cell):
    """What a stage hands on.

    Args:
        objective: of its model chunk.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(auto_prefix=False)
        self.objective = objective

    def construct(
        self,
        x: Tensor,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        random_B3: Tensor,
        inv_counts: Tensor,
    ) -> Tensor:
        """[B * S, H]; the arguments are those of :meth:`Objective.forward_step`."""
        return self.objective.forward_step(
            x, labels_BS, positions_BS, segments_BS, inv_counts, random_B3, ids_BS
        )[1]


class _WithOutputGrad(nn.Cell):
    """A scalar with the gradients of the whole batch's scaled loss: this model chunk's part of it,
    and what it hands on times the gradient that came back for that.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(auto_prefix=False)
        self.objective, self.predicts = objective, objective.predicts

    def construct(
        self,
        x: Tensor,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        random_B3: Tensor,
        scales: Tensor,
        output_grad_TH: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        total, states_TH, parts = self.objective.forward_step(
            x, labels_BS, positions_BS, segments_BS, scales[:2], random_B3, ids_BS
        )
        scaled = total * scales[2]
        if not self.predicts:
            scaled = scaled + _sum(_cast(states_TH, ms.float32) * _cast(output_grad_TH, ms.float32))
        return scaled, (total, *parts)


class StageBackward(nn.Cell):
    """Adds a micro-batch's gradients to the sums.

    Args:
        objective: of the stage's model chunk.
        weights: what is trained of it, by name.

    Attributes:
        sums: the gradients so far, float32.
    """

    def __init__(self, objective: Objective, weights: Mapping[str, Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.with_output_grad = _WithOutputGrad(objective)
        self.embeds = objective.embeds
        position = None if self.embeds else 0
        trained = ParameterTuple(weights.values())
        self.gradient = ms.value_and_grad(self.with_output_grad, position, trained, has_aux=True)
        self.sums = gradient_sums(weights)

    def construct(
        self,
        x: Tensor,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        random_B3: Tensor,
        scales: Tensor,
        output_grad_TH: Tensor,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The stage's parts of total and report, and the gradient of ``x``.

        Args:
            x: what the stage was given.
            ids_BS: int32, the tokens: every stage reads the batch, and gates may take them.
            labels_BS: int32.
            positions_BS: int32.
            segments_BS: int32.
            random_B3: int32, see :class:`~mistral_ms.models.Objective`.
            scales: as of :class:`~mistral_ms.training.graphs.MicroBatchGradients`.
            output_grad_TH: the gradient of what the stage handed on; of no meaning for the last
                one.
        """
        (_, parts), gradients = self.gradient(
            x, ids_BS, labels_BS, positions_BS, segments_BS, random_B3, scales, output_grad_TH
        )
        input_grad = scales
        if not self.embeds:
            input_grad, gradients = gradients
        wide = to_float32(gradients)
        done = scales[0]
        for i in range(len(self.sums)):
            done = ops.depend(done, ops.assign_add(self.sums[i], wide[i]))
        return (ops.depend(parts[0], done), *parts[1:]), input_grad


Place = tuple[int, int]
"""A chunk of the stage, and a micro-batch."""


class PipelinedGradients:
    """Runs one stage's part of a schedule.

    Args:
        objectives: of each of the stage's model chunks.
        weights: what is trained of it, by name.
        schedule: of all stages.
        p2p: the stage's ways to its neighbours.

    Attributes:
        sums: the summed gradients.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        weights: Mapping[str, Parameter],
        schedule: Schedule,
        p2p: P2PCommunicator,
    ) -> None:
        self._program = program(schedule, p2p.stage)
        self._p2p, self._stage = p2p, p2p.stage
        self._forward = [None if each.predicts else StageForward(each) for each in objectives]
        self._backward = []
        for each in objectives:
            held = each.model.weights()
            own = {name: weight for name, weight in weights.items() if name in held}
            self._backward.append(StageBackward(each, own))
        self._objectives = tuple(objectives)
        self._embeds = objectives[0].embeds
        self._width = objectives[0].model.config.hidden_size
        self._dtype = next(iter(weights.values())).dtype
        self.sums = ParameterTuple([each for part in self._backward for each in part.sums])

    def __call__(self, parts: Sequence[BatchTensors], scales: Tensor) -> list[np.ndarray]:
        """Adds the gradients of all micro-batches to the sums.

        Args:
            parts: the micro-batches of this rank.
            scales: as of :class:`~mistral_ms.training.graphs.MicroBatchGradients`.

        Returns:
            The stage's parts of total and report, added up over the micro-batches.
        """
        outputs: dict[Place, Tensor] = {}
        output_grads: dict[Place, Tensor] = {}
        input_grads: dict[Place, Tensor] = {}
        losses: list[tuple[Tensor, ...]] = []
        inputs, nothing = self._begun(parts)
        for event in self._program:
            number, key = event.micro_batch, (event.chunk, event.micro_batch)
            if isinstance(event, Transfer):
                sent = outputs if event.phase is Phase.FORWARD else input_grads
                kept = inputs if event.phase is Phase.FORWARD else output_grads
                sending = event.sender == self._stage
                message = sent.pop(key) if sending else nothing
                arrived = self._p2p.exchange(event, message)
                if not sending:
                    kept[event.receiving_chunk, number] = arrived
            elif event.phase is Phase.FORWARD:
                forward = self._forward[event.chunk]
                if forward is not None:
                    outputs[key] = forward(inputs[key], *parts[number], scales[:2])
            else:
                output_grad = output_grads.pop(key, nothing)
                backward = self._backward[event.chunk]
                found, input_grad = backward(inputs.pop(key), *parts[number], scales, output_grad)
                losses.append(found)
                input_grads[key] = input_grad
        return added_up(losses)

    def forward(self, parts: Sequence[BatchTensors], inv_counts: Tensor) -> None:
        """All micro-batches go forward through all stages, and nothing comes back; for those who
        watch the layers.

        Args:
            parts: the micro-batches of this rank.
            inv_counts: as of :class:`~mistral_ms.models.Objective`.
        """
        outputs: dict[Place, Tensor] = {}
        inputs, nothing = self._begun(parts)
        for event in self._program:
            number, key = event.micro_batch, (event.chunk, event.micro_batch)
            if event.phase is Phase.BACKWARD:
                continue
            if isinstance(event, Transfer):
                sending = event.sender == self._stage
                arrived = self._p2p.exchange(event, outputs.pop(key) if sending else nothing)
                if not sending:
                    inputs[event.receiving_chunk, number] = arrived
            else:
                ids, labels, positions, segments, random, *_ = parts[number]
                _, outputs[key], _ = self._objectives[event.chunk].forward_step(
                    inputs.pop(key), labels, positions, segments, inv_counts, random, ids
                )

    def _begun(self, parts: Sequence[BatchTensors]) -> tuple[dict[Place, Tensor], Tensor]:
        """What the first stage is given, and what stands for a message on its receiver's side."""
        nothing = ops.zeros((parts[0][0].size, self._width), self._dtype)
        if not self._embeds:
            return {}, nothing
        return {(0, number): ids_BS for number, (ids_BS, *_) in enumerate(parts)}, nothing

    def cells(self) -> tuple[nn.Cell, ...]:
        """The cells that are compiled for the device."""
        return (*(each for each in self._forward if each is not None), *self._backward)
