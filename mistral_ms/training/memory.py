"""How many bytes a training keeps between its steps, and where; counted, not calculated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mindspore import Parameter, nn

from mistral_ms.layers import is_buffer
from mistral_ms.training.offload import HostOptimizer
from mistral_ms.training.step import TrainStep


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
    def device_bytes_per_parameter(self) -> float:
        """Weights and optimizer state on the device."""
        return (self.device_weights + self.device_optimizer) / max(1, self.parameters)

    def __str__(self) -> str:
        def size(nbytes: int) -> str:
            return f"{nbytes / 1e6:.1f} MB"

        return (
            f"on the device: weights {size(self.device_weights)}, optimizer state "
            f"{size(self.device_optimizer)}, summed gradients {size(self.device_gradients)}; "
            f"in host memory: optimizer state {size(self.host_optimizer)}"
        )


def memory_report(update: TrainStep) -> MemoryReport:
    """Counts the Parameters that the compiled graphs of an update own, and those of the host."""
    owned = _unique(p for cell in update.cells() for p in _parameters(cell))
    weights = {id(p) for p in update.model.weights().values()}
    sums = {id(p) for p in update.gradient_sums()}
    host = update.optimizer.host_parameters() if isinstance(update.optimizer, HostOptimizer) else []
    return MemoryReport(
        parameters=sum(p.size for p in update.weights.values()),
        device_weights=_bytes(p for p in owned if id(p) in weights),
        device_gradients=_bytes(p for p in owned if id(p) in sums),
        device_optimizer=_bytes(
            p for p in owned if id(p) not in weights | sums and not is_buffer(p)
        ),
        host_optimizer=_bytes(host),
    )


def _parameters(cell: nn.Cell) -> list[Parameter]:
    return list(cell.get_parameters())


def _unique(parameters: Iterable[Parameter]) -> list[Parameter]:
    return list({id(p): p for p in parameters}.values())


def _bytes(parameters: Iterable[Parameter]) -> int:
    return sum(int(p.nbytes) for p in parameters)
