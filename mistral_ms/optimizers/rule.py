"""How one weight is updated: what an optimizer has to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from mindspore import Tensor, nn, ops


class Group(Protocol):
    """The processes that hold the rows of a parameter, in order.

    Attributes:
        size: how many.
        position: of this one.
    """

    size: int
    position: int

    def all_gather(self, x: Tensor) -> Tensor:
        """Everybody's tensor [...], stacked: [size, ...]."""


@dataclass(frozen=True)
class StoredMatrices:
    """How a parameter [E * R, C], or some rows of it, keeps matrices that are [E, O, I] in
    checkpoints.

    Attributes:
        rows: R.
        transposed: each matrix [R, C] is the transpose of a checkpoint's [O, I].
        group: the processes that hold equal numbers of rows each; None: this one has them all.
    """

    rows: int
    transposed: bool = False
    group: Group | None = None


class Rule(nn.Cell):
    """The update of one weight by its gradient; float32 throughout.

    A rule is compiled into the graph of the training step, runs on the host's processor when the
    optimizer is offloaded, and sees its weights one by one. Whatever changes from step to step
    reaches it in ``coefficients``, which the host computes in double precision: the graph is
    compiled once, and the optimizer's only state is the tensors that it names.

    Args:
        settings: of the optimizer.
        decays: whether the weights that this instance updates have a weight decay above zero.
        on_host: its kernels run on the host's processor, whatever the device.

    Attributes:
        elementwise: an element's update reads no other element, so that ranks may divide a weight
            in any way. Otherwise the rule asks :meth:`whole` for the matrices, and layouts that
            divide their columns are refused.
        scales: the gradient comes as it was before clipping; what it must be multiplied by comes
            behind the coefficients.
        idle: None for a rule that returns new values. A rule whose kernels write weight and state
            in place has here the coefficients with which a gradient of zero changes nothing: the
            auto-parallel graph allows no branch around the update.
    """

    elementwise: ClassVar[bool] = True
    scales: bool = False
    idle: ClassVar[tuple[float, ...] | None] = None

    def __init__(self, settings: Any, decays: bool, on_host: bool) -> None:
        super().__init__(auto_prefix=False)
        self.decays, self.on_host = decays, on_host
        self.matrices: _Matrices | None = None

    @classmethod
    def state_names(cls, settings: Any) -> tuple[str, ...]:
        """The tensors that are kept of each weight: float32, of the weight's shape, zero at first.

        Checkpoints have them as ``NAME.`` and the weight's name. Of the weight's shape and no
        other, because then any layout of ranks can read the checkpoint of any other.
        """
        raise NotImplementedError

    @classmethod
    def coefficients(
        cls, settings: Any, updates: int, lr: float, weight_decay: float
    ) -> tuple[float, ...]:
        """The numbers of one step, at least one, always as many; rounded to float32 afterwards.

        Args:
            settings: of the optimizer.
            updates: how many there were before.
            lr: the learning rate of the weight's parameter group.
            weight_decay: likewise.
        """
        raise NotImplementedError

    def construct(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: tuple[Tensor, ...],
        coefficients: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """The new weight and its new state, in the order of :meth:`state_names`.

        Args:
            weight: float32.
            gradient: float32, of the same shape.
            state: likewise, in the order of :meth:`state_names`.
            coefficients: float32 scalars, as :meth:`coefficients` gives them.
        """
        raise NotImplementedError

    def keep_as(self, stored: StoredMatrices | None) -> None:
        """Says how the weights keep their matrices; without it as checkpoints do, and whole.

        Args:
            stored: how.
        """
        if stored is not None:
            self.matrices = _Matrices(stored)

    def whole(self, x: Tensor) -> Tensor:
        """Whole matrices as checkpoints have them, [O, I] or [E, O, I], of a tensor that lies as
        the weight does.
        """
        return x if self.matrices is None else self.matrices.whole(x)

    def held(self, x: Tensor) -> Tensor:
        """The way back: of whole matrices what this process holds, as the weight lies."""
        return x if self.matrices is None else self.matrices.held(x)

    def kernel(self, primitive: ops.Primitive) -> ops.Primitive:
        """The primitive, on the host's processor if that is where this rule runs. Whatever works on
        whole tensors must come from here; operators such as ``*`` run on the device.
        """
        return primitive.set_device("CPU") if self.on_host else primitive


class _Matrices(nn.Cell):
    """From rows that a process holds to whole matrices [E, O, I], and back.

    No size is taken from a tensor: where MindSpore divides a graph, the compiler asks for shapes
    before it cuts parameters and again afterwards, so what follows must be right for a part as well
    as for ``group.size`` times as much.
    """

    def __init__(self, stored: StoredMatrices) -> None:
        super().__init__(auto_prefix=False)
        self.rows, self.transposed, self.group = stored.rows, stored.transposed, stored.group
        if stored.group is not None:
            self.position = stored.group.position
            self.split = ops.Split(0, stored.group.size)

    def whole(self, x_RC: Tensor) -> Tensor:
        """Rows -> [E, O, I]."""
        columns = x_RC.shape[-1]
        if self.group is not None:
            x_RC = self.group.all_gather(x_RC)
        x_ERC = x_RC.reshape(-1, self.rows, columns)
        return x_ERC.transpose(0, 2, 1) if self.transposed else x_ERC

    def held(self, x_EOI: Tensor) -> Tensor:
        """[E, O, I] -> rows."""
        x_ERC = x_EOI.transpose(0, 2, 1) if self.transposed else x_EOI
        x_RC = x_ERC.reshape(-1, x_ERC.shape[-1])
        return x_RC if self.group is None else self.split(x_RC)[self.position]
