"""The training step of MindFormers for models with router losses, on any device."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindformers.wrapper import MFPipelineWithLossScaleCell, MFTrainOneStepCell
from mindformers.wrapper.wrapper import DataOrderWrapperCell, get_real_models
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.communication import GlobalComm, get_group_size

from mistral_ms.config import IGNORE_INDEX
from mistral_ms.errors import ConfigError
from mistral_ms.mindformers.graph import GraphClipping, WholeBatch, recorded_losses
from mistral_ms.mindformers.modeling import MistralForCausalLM
from mistral_ms.mindformers.monitor import StepLosses

_sum = ops.ReduceSum()
_is_finite = ops.IsFinite()
_assign = ops.Assign()
_hyper_map = ops.HyperMap()


class ScaledLosses(nn.Cell):
    """The loss of one dispatch group times the loss scale, and what it consists of.

    Args:
        model: the model.
    """

    def __init__(self, model: MistralForCausalLM) -> None:
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        inv_counts: Tensor,
        scale: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The scaled total; the total, and its parts as :class:`~mistral_ms.models.Objective`
        gives them.
        """
        total, parts = self.model.objective(tokens_BS, labels_BS, positions_BS, None, inv_counts)
        return total * scale, (total, *parts)


def in_order(columns: tuple[str, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    """Tokens and labels of a dataset's columns.

    Raises:
        ValueError: more columns, or fewer.
    """
    if len(inputs) != len(columns):
        raise ValueError("the dataset gives other columns than train_dataset.input_columns names")
    if len(columns) == 1:
        return inputs[0], None
    if columns[0] == "labels":
        return inputs[1], inputs[0]
    return inputs[0], inputs[1]


GRAPH_INPUTS = (
    *("input_ids", "labels", "input_position"),
    *("position_ids", "attention_mask", "input_embeds"),
)
"""The model's arguments that take the six inputs of the auto-parallel graph."""


def columns_of(network: nn.Cell) -> tuple[str, ...]:
    """The arguments of the model that the dataset's columns go to, in their order.

    Raises:
        ConfigError: no tokens, or columns that the model does not know.
    """
    names = ("input_ids", "labels")
    cell = _ordering(network)
    found = names[:1] if cell is None else tuple(cell.construct_args_key)
    if names[0] not in found or set(found) - set(names):
        raise ConfigError(
            "unknown columns",
            where="train_dataset.input_columns",
            value=", ".join(found),
            rule="input_ids, and perhaps labels",
        )
    return found


def _ordering(network: nn.Cell) -> DataOrderWrapperCell | None:
    """MindFormers' cell that names the dataset's columns, wherever it lies inside."""
    cells = (each for _, each in network.cells_and_names())
    return next((each for each in cells if isinstance(each, DataOrderWrapperCell)), None)


def _accumulated(buffers: ParameterTuple) -> nn.Cell:
    """What micro-batches have added up of the gradients of buffers."""
    reducer = nn.PipelineGradReducer(buffers)
    reducer.scale_sense.name = "metrics_scale"  # MindFormers' step has one of its name
    return reducer


class _GraphGradients(nn.Cell):
    """What a step of MindFormers needs for the auto-parallel graph."""

    def prepare(
        self, model: MistralForCausalLM, max_grad_norm: float, accumulated: bool = False
    ) -> None:
        """Takes the model, which lies somewhere inside the step's network.

        Args:
            model: divided among processes, or as if.
            max_grad_norm: gradients are scaled down to this norm.
            accumulated: whether micro-batches add up what is recorded.
        """
        self.columns = columns_of(self.network)
        if (cell := _ordering(self.network)) is not None:
            cell.construct_args_key = list(GRAPH_INPUTS)
        # called by MindFormers' trainer on the network when a checkpoint was loaded
        self.network.init_parameters_data = model.init_parameters_data
        buffers = tuple(model.net.metrics_buffers().values())
        for buffer in buffers:  # not before the optimizer was made, which takes what is trained
            buffer.requires_grad = True
        self.model, self.buffers = model, ParameterTuple(buffers)
        self.count = len(self.weights)
        self.metrics_reducer = nn.Identity() if not accumulated else _accumulated(self.buffers)
        self.network.set_grad()
        self.value_and_grad = ops.value_and_grad(
            self.network, None, ParameterTuple((*self.weights, *buffers))
        )
        self.whole_batch = WholeBatch(
            model.run_config.training.seq_length, model.pad_token_id, model.ignore_token_id
        )
        self.clip_grad_norm = GraphClipping(
            tuple(weight.name for weight in self.weights),
            model.net.specs,
            model.sharding,
            model.run_config.parallel.optimizer_parallel,
            max_grad_norm,
        )

    def graph_gradients(self, scaling_sens: Tensor, *inputs: Tensor) -> tuple[Tensor, Any]:
        """The loss without the scale, and the gradients with it.

        The scale goes in with the batch, where the router's losses see it too, and the whole
        batch's counts with it: the gradient that goes in at the end is one.
        """
        scale = ops.cast(scaling_sens, ms.float32).reshape(())
        ids, labels = in_order(self.columns, inputs)
        batch = self.whole_batch(scale, ids, labels)
        loss, gradients = self.value_and_grad(*batch)
        gradients, recorded = gradients[: self.count], gradients[self.count :]
        recorded = _hyper_map(_assign, self.buffers, self.metrics_reducer(recorded))
        loss = ops.depend(loss, recorded)
        return loss / scale, gradients

    def graph_losses(self) -> StepLosses:
        """What the last step's loss consisted of, of this process' stage."""
        return recorded_losses(self.model.net, self.model.sharding, self.model.run_config)


class MoETrainOneStepCell(_GraphGradients, MFTrainOneStepCell):
    """MindFormers' step, which also keeps what the loss consists of, adds up micro-batches, finds
    overflows on devices without a status register, and scales the router's losses in the
    auto-parallel graph. In data parallel mode the rows of all processes are one batch, and those of
    each a dispatch group.

    For models that are not ours it is MindFormers' own step.

    Args:
        network: what is trained.
        optimizer: updates it.
        micro_batch_num: parts of a batch that go through the model one after the other; each is a
            dispatch group of its own.
        kwargs: see MindFormers.

    Attributes:
        report: float32, the last step's loss and what it consists of: see :meth:`losses`. Not
            trained.

    Raises:
        ConfigError: processes that do not train one model together, or a mean of their gradients.
    """

    def __init__(
        self, network: nn.Cell, optimizer: nn.Cell, micro_batch_num: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(network, optimizer, **kwargs)
        self.portable = ms.get_context("device_target") == "CPU"
        self.micro_batches = micro_batch_num
        real = get_real_models(network)
        self.divided = isinstance(real, MistralForCausalLM) and real.divided
        self.ours = isinstance(real, MistralForCausalLM) and not self.divided
        if self.divided:
            self.prepare(real, kwargs.get("max_grad_norm", 1.0))
        if not self.ours:
            return
        self.columns, self.model = columns_of(network), real
        self.replicated = is_replicated()
        self.all_reduce = ops.AllReduce() if self.replicated else nn.Identity()
        # called by MindFormers' trainer on the network when a checkpoint was loaded
        network.init_parameters_data = real.init_parameters_data
        self.value_and_grad = ms.value_and_grad(
            ScaledLosses(real), None, self.weights, has_aux=True
        )
        config = real.language_model.config
        layers = len(config.sparse_layers)
        experts = 0 if config.moe is None else config.moe.num_local_experts
        self.sizes = layers, experts
        self.report = Parameter(
            Tensor(np.zeros(4 + 2 * layers * experts, np.float32)),
            name="router_report",
            requires_grad=False,
        )

    def grads_for_legacy(self, scaling_sens: Tensor, *inputs: Tensor) -> tuple[Any, Any, Any]:
        """Loss, scaled gradients, and a further divisor of theirs; called by MindFormers' step."""
        if self.divided:
            return *self.graph_gradients(scaling_sens, *inputs), self.grad_scale_factor
        if not self.ours:
            return super().grads_for_legacy(scaling_sens, *inputs)
        tokens, labels, positions = self.model.next_tokens(*in_order(self.columns, inputs))
        counted = ops.stack((_count(labels != IGNORE_INDEX), _count(positions >= 0)))
        counted = self.all_reduce(counted)  # MindFormers adds up the gradients
        inv_counts = 1.0 / ops.maximum(counted, ops.ones_like(counted))
        scale = ops.cast(scaling_sens, ms.float32).reshape(())
        rows = tokens.shape[0] // self.micro_batches
        (_, parts), grads = self.value_and_grad(
            tokens[:rows], labels[:rows], positions[:rows], inv_counts, scale
        )
        for number in range(1, self.micro_batches):
            first, last = number * rows, (number + 1) * rows
            (_, others), more = self.value_and_grad(
                tokens[first:last], labels[first:last], positions[first:last], inv_counts, scale
            )
            added: tuple[Tensor, ...] = ()
            for i in range(len(parts)):
                added = (*added, parts[i] + others[i])
            parts = added
            summed: tuple[Tensor, ...] = ()
            for i in range(len(grads)):
                summed = (*summed, grads[i] + more[i])
            grads = summed
        seen = ops.stack(parts[:4])
        if self.sizes[0] > 0:
            seen = ops.cat((seen, parts[4].reshape(-1), parts[5].reshape(-1)))
        seen = self.all_reduce(seen)
        loss = ops.depend(seen[0], ops.assign(self.report, seen))
        return loss, grads, self.grad_scale_factor

    def start_overflow_check(self, pre_cond: Any, compute_input: Any) -> tuple[Any, Any]:
        """See MindFormers."""
        if self.portable:
            return 0, compute_input
        return super().start_overflow_check(pre_cond, compute_input)

    def get_overflow_status(self, status: Any, compute_output: Any) -> Tensor:
        """Whether a gradient is not finite; see MindFormers."""
        if not self.portable:
            return super().get_overflow_status(status, compute_output)
        found = ops.zeros((), ms.float32)
        for gradient in compute_output:
            found = found + _count(ops.logical_not(_is_finite(gradient)))
        return found > 0

    def losses(self) -> StepLosses | None:
        """What the last step's loss consisted of, as arrays; None for a model that is not ours."""
        if self.divided:
            return self.graph_losses()
        if not self.ours:
            return None
        values = self.report.asnumpy()
        routed, kept = np.split(values[4:], 2)
        lm, aux, z = map(float, values[1:4])
        return StepLosses(lm, aux, z, routed.reshape(self.sizes), kept.reshape(self.sizes))


class MoEPipelineTrainOneStepCell(_GraphGradients, MFPipelineWithLossScaleCell):
    """MindFormers' step of a pipeline, or of micro-batches, with the router's losses scaled and the
    gradients' norm that of all stages; for models that are not ours MindFormers' own.

    Args:
        network: what is trained.
        optimizer: updates it.
        kwargs: see MindFormers.
    """

    def __init__(self, network: nn.Cell, optimizer: nn.Cell, **kwargs: Any) -> None:
        super().__init__(network, optimizer, **kwargs)
        real = get_real_models(network)
        self.divided = isinstance(real, MistralForCausalLM) and real.divided
        if self.divided:
            self.prepare(real, kwargs.get("max_grad_norm", 1.0), accumulated=True)

    def grads_for_legacy(self, scaling_sens: Tensor, *inputs: Tensor) -> tuple[Any, Any, Any]:
        """See MindFormers; its monitor divides the loss by the micro-batches."""
        if not self.divided:
            return super().grads_for_legacy(scaling_sens, *inputs)
        loss, gradients = self.graph_gradients(scaling_sens, *inputs)
        return loss * self.micro_size, gradients, self.grad_scale_factor

    def losses(self) -> StepLosses | None:
        """See :class:`MoETrainOneStepCell`."""
        return self.graph_losses() if self.divided else None


def is_replicated() -> bool:
    """Whether several processes have the same model, and rows of their own.

    Raises:
        ConfigError: a mode in which each trains alone, or a mean of gradients that add up.
    """
    mode = ms.get_auto_parallel_context("parallel_mode")
    if not GlobalComm.INITED or get_group_size() == 1:
        return False
    if mode != "data_parallel":
        raise ConfigError(
            "unsupported value",
            where="parallel.parallel_mode",
            value=mode,
            rule="processes that share a training divide its rows, or its graph",
            todo="set 0 (data_parallel), or on Ascend 1 (semi_auto_parallel)",
        )
    if ms.get_auto_parallel_context("gradients_mean"):
        raise ConfigError(
            "unsupported value",
            where="parallel.gradients_mean",
            value=True,
            rule="the losses of processes are shares of a mean already",
            todo="set False",
        )
    return True


def _count(condition: Tensor) -> Tensor:
    return _sum(ops.cast(condition, ms.float32))
