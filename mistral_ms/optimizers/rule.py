"""How one weight is updated: what an optimizer has to say."""

from __future__ import annotations

from typing import Any, ClassVar

from mindspore import Tensor, nn, ops


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
            in any way. Otherwise the rule is given whole weights, of the shape that they have in
            checkpoints ([O, I], or [E, O, I] of stacked experts), and layouts that divide its
            matrices are refused.
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

    def kernel(self, primitive: ops.Primitive) -> ops.Primitive:
        """The primitive, on the host's processor if that is where this rule runs. Whatever works on
        whole tensors must come from here; operators such as ``*`` run on the device.
        """
        return primitive.set_device("CPU") if self.on_host else primitive
