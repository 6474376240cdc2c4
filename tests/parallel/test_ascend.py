"""The Ascend backend as far as a CPU can judge it: what its primitives are given, and what is made
of what they give back. The primitives are stand-ins; nothing here has run on an NPU."""

from typing import ClassVar

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mistral_ms.config.layout import Sizes
from mistral_ms.errors import TopologyError
from mistral_ms.parallel.collectives import AscendCollectives, Collectives, Groups, ascend
from mistral_ms.parallel.topology import GroupKind, Topology


class Primitive:
    """Remembers how it was made and called; returns what it is told to."""

    made: ClassVar[dict] = {}

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs, self.calls, self.answer = args, kwargs, [], None
        type(self).made[type(self).__name__] = self

    def __call__(self, *inputs):
        self.calls.append(inputs)
        return inputs[0] if self.answer is None else self.answer


NAMES = (
    "AllReduce",
    "AllGather",
    "ReduceScatter",
    "AlltoAll",
    "AlltoAllV",
    "Broadcast",
    "Send",
    "Receive",
)


@pytest.fixture
def primitives(monkeypatch):
    monkeypatch.setattr(Primitive, "made", {})
    for name in NAMES:
        monkeypatch.setattr(ascend.ops, name, type(name, (Primitive,), {}))
    return Primitive.made


@pytest.fixture
def second_of_two(primitives):
    group = Topology(Sizes(2, 1, 1, 1)).group(GroupKind.DATA, 1)
    return AscendCollectives(group, 1, "a_group")


def test_every_primitive_belongs_to_the_group(second_of_two, primitives):
    assert set(primitives) == set(NAMES) - {"Send", "Receive"}
    assert all(each.kwargs["group"] == "a_group" for each in primitives.values())
    assert primitives["AlltoAll"].args == (2, 0, 0)
    assert primitives["Broadcast"].args == (0,)


def test_shapes_of_gather_and_scatter(second_of_two, primitives):
    x = Tensor(np.ones((3, 2), np.float32))
    second_of_two.all_gather(x)
    assert primitives["AllGather"].calls[0][0].shape == (1, 3, 2)
    primitives["ReduceScatter"].answer = Tensor(np.ones((1, 2), np.float32))
    assert second_of_two.reduce_scatter(x).shape == (2,)
    primitives["Broadcast"].answer = (x,)
    assert second_of_two.broadcast(x) is x


@pytest.mark.parametrize("received", [0, 2])
def test_unequal_rows(second_of_two, primitives, received):
    """Counts become numbers of elements; what arrives is followed by zeros up to the room, and is
    all zero when nothing arrives, where the primitive returns one meaningless element."""
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    arrived = np.array([5, 6, 7, 8], np.float32) if received else np.float32(np.nan)
    primitives["AlltoAllV"].answer = Tensor(arrived)
    mask = (np.arange(3) < received).astype(np.float32)
    counts = [Tensor(np.array(c, np.int32)) for c in ([1, 2], [0, received])]
    got = second_of_two.all_to_all_v(Tensor(rows), *counts, Tensor(mask)).numpy()
    flat, send, receive = primitives["AlltoAllV"].calls[0]
    np.testing.assert_array_equal(flat.numpy(), rows.ravel())
    assert (send.dtype, send.numpy().tolist()) == (ms.int64, [2, 4])
    assert (receive.dtype, receive.numpy().tolist()) == (ms.int64, [0, 2 * received])
    want = np.zeros((3, 2), np.float32)
    want[:received] = np.arange(5, 9).reshape(2, 2)[:received]
    np.testing.assert_array_equal(got, want)


def test_point_to_point(second_of_two, primitives, monkeypatch):
    """The second of two receives what is passed on, and sends what is passed back."""
    monkeypatch.setattr(ascend.ops, "depend", lambda value, _: value)
    x = Tensor(np.ones((3, 2), np.float32))
    second_of_two.pass_on(x)
    expected = {"sr_tag": 0, "src_rank": 0, "shape": [3, 2], "dtype": ms.float32}
    assert primitives["Receive"].kwargs == {**expected, "group": "a_group"}
    assert "Send" not in primitives
    assert second_of_two.pass_back(x) is x
    assert primitives["Send"].kwargs == {"sr_tag": 1, "dest_rank": 0, "group": "a_group"}


def test_a_group_of_one_needs_no_backend():
    groups = Groups(Topology(Sizes(1, 1, 1, 1)), 0, "Ascend")
    alone = groups.of(GroupKind.EXPERT)
    assert groups.of(GroupKind.DATA) is alone
    x = Tensor(np.ones((1, 3), np.float32))
    for operation in ("all_reduce", "all_to_all", "broadcast"):
        assert getattr(alone, operation)(x) is x
    assert alone.all_gather(x).shape == (1, 1, 3)
    assert alone.reduce_scatter(x).shape == (3,)


@pytest.mark.parametrize("room", [2, 6])
def test_unequal_rows_of_a_group_of_one(room):
    alone = Groups(Topology(Sizes(1, 1, 1, 1)), 0, "CPU").of(GroupKind.EXPERT)
    rows = np.arange(8, dtype=np.float32).reshape(4, 2) + 1
    count, mask = Tensor(np.array([2], np.int32)), (np.arange(room) < 2).astype(np.float32)
    got = alone.all_to_all_v(Tensor(rows), count, count, Tensor(mask)).numpy()
    np.testing.assert_array_equal(got, [*rows[:2], *np.zeros((room - 2, 2))])


def test_an_unknown_backend():
    with pytest.raises(TopologyError, match="no collectives: device target: GPU: CPU or Ascend"):
        Groups(Topology(Sizes(1, 1, 1, 1)), 0, "GPU")


def test_the_interface_alone_does_nothing():
    group = Topology(Sizes(2, 1, 1, 1)).group(GroupKind.DATA, 0)
    bare = Collectives(group, 0)
    for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"):
        with pytest.raises(NotImplementedError):
            getattr(bare, name)(None)
    with pytest.raises(NotImplementedError):
        bare.all_to_all_v(None, None, None, None)
    for name in ("pass_on", "pass_back"):
        with pytest.raises(NotImplementedError):
            getattr(bare, name)(None)
