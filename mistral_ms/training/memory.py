"""How many bytes a training keeps between its steps, counted, and in a step, calculated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mindspore import Parameter

from mistral_ms.config import RunConfig
from mistral_ms.layers import is_buffer
from mistral_ms.models import tokens_at_a_time
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.parallel.memory import (
    FLOAT,
    ActivationMemory,
    activation_memory,
    fused_operators,
    megabytes,
)


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Persistent bytes by what they are and where they live; activations are not persistent.

    Attributes:
        parameters: elements that are trained.
        device_weights: bytes of the model's weights on the device.
        device_optimizer: bytes of means and masters there.
        device_gradients: bytes of the sums that micro-batches add up in; without micro-batches
            gradients live only within a step.
        host_optimizer: bytes of means and masters in host memory.
    """

    parameters: int
    device_weights: int
    device_optimizer: int
    device_gradients: int
    host_optimizer: int

    @property
    def device(self) -> int:
        """Everything on the device."""
        return self.device_weights + self.device_optimizer + self.device_gradients

    @property
    def device_bytes_per_parameter(self) -> float:
        """Weights and optimizer state on the device."""
        return (self.device_weights + self.device_optimizer) / max(1, self.parameters)

    def __str__(self) -> str:
        return (
            f"on the device: weights {megabytes(self.device_weights)}, optimizer state "
            f"{megabytes(self.device_optimizer)}, summed gradients "
            f"{megabytes(self.device_gradients)}; in host memory: optimizer state "
            f"{megabytes(self.host_optimizer)}"
        )


def memory_report(
    owned: Iterable[Parameter],
    *,
    trained: Iterable[Parameter],
    weights: Iterable[Parameter],
    sums: Iterable[Parameter] = (),
    host: Iterable[Parameter] = (),
) -> MemoryReport:
    """Counts the Parameters that compiled graphs own, and those of the host.

    Args:
        owned: by the graphs of the device; whatever else is counted, too.
        trained: the weights that are trained.
        weights: all of them.
        sums: what micro-batches add their gradients up in.
        host: optimizer state in host memory.
    """
    owned, outside = _unique(owned), list(host)
    held, added = {id(p) for p in weights}, {id(p) for p in sums}
    return MemoryReport(
        parameters=sum(p.size for p in trained),
        device_weights=_bytes(p for p in owned if id(p) in held),
        device_gradients=_bytes(p for p in owned if id(p) in added),
        device_optimizer=_bytes(p for p in owned if id(p) not in held | added and not is_buffer(p)),
        host_optimizer=_bytes(outside),
    )


def step_memory(
    run: RunConfig, parallel_context: ParallelContext, kept: MemoryReport, device: str
) -> ActivationMemory:
    """What a step of this process holds beside what is kept between steps.

    Args:
        run: the run, its steps counted out.
        parallel_context: this process among the others.
        kept: between steps.
        device: "Ascend" or "CPU".
    """
    execution, training = run.parallel.execution_on(device), run.training
    if run.dpo is not None:  # two rows a pair
        rows = 2 * training.global_batch_size
        training = training.model_copy(update={"global_batch_size": rows})
    return activation_memory(
        run.model,
        run.routing,
        training,
        run.parallel,
        stage=parallel_context.groups.coords.pp,
        execution=execution,
        fused=fused_operators(device, training.dtype),
        logit_tokens=tokens_at_a_time(run.model.vocab_size) if execution == "explicit" else None,
        gradients=kept.parameters * FLOAT,
    )


def _unique(parameters: Iterable[Parameter]) -> list[Parameter]:
    return list({id(p): p for p in parameters}.values())


def _bytes(parameters: Iterable[Parameter]) -> int:
    return sum(int(p.nbytes) for p in parameters)
