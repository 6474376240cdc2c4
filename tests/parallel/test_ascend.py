"""The Ascend backend as far as a CPU can judge it: with primitives that do among the members of a
group what MindSpore documents of HCCL's, every operation is what the interface says. Nothing here
has run on an NPU."""

import functools

import numpy as np
import pytest
from mindspore import Tensor

from mistral_ms.config.layout import Sizes
from mistral_ms.errors import TopologyError
from mistral_ms.parallel.collectives import AscendCollectives, Groups, ascend
from mistral_ms.parallel.topology import GroupKind, Topology


class WaitingError(Exception):
    """A member cannot go on before the others have given theirs."""


class Network:
    """The members of one group, one after the other in this process: each gives first what it
    gives and is interrupted, then each is called again and gets its answer.
    """

    def __init__(self, size):
        self.size, self.me, self.given, self.letters = size, 0, {}, {}
        group = Topology(Sizes(size, 1, 1, 1)).group(GroupKind.DATA, 0)
        self.members = [AscendCollectives(group, rank, "theirs") for rank in range(size)]

    def all(self, operation, gave):
        """What every member gets when member r calls ``operation`` with ``gave[r]``."""
        for rank in range(self.size):
            with pytest.raises(WaitingError):
                self.call(operation, rank, gave)
        return [self.call(operation, rank, gave) for rank in range(self.size)]

    def call(self, operation, rank, gave):
        self.me = rank
        inputs = [Tensor(x) for x in gave[rank]]
        return getattr(self.members[self.me], operation)(*inputs).numpy()


class Primitive:
    """One that answers by what all members gave."""

    def __init__(self, network, meaning, *settings, group):
        assert group == "theirs"
        self.network, self.meaning = network, functools.partial(meaning, *settings)

    def __call__(self, *inputs):
        net = self.network()
        if net.me in net.given:
            return self.meaning([net.given[rank] for rank in range(net.size)], net.me)
        flat = inputs[0] if isinstance(inputs[0], tuple) else inputs
        net.given[net.me] = [x.numpy() for x in flat]
        raise WaitingError


def all_reduce(gave, me):
    return Tensor(sum(x for (x,) in gave))


def all_gather(gave, me):
    """Joined along the first dimension."""
    return Tensor(np.concatenate([x for (x,) in gave]))


def reduce_scatter(gave, me):
    """The sum, cut along the first dimension."""
    return Tensor(np.split(sum(x for (x,) in gave), len(gave))[me])


def all_to_all(count, split_dim, concat_dim, gave, me):
    assert count == len(gave)
    return Tensor(np.concatenate([np.split(x, count, split_dim)[me] for (x,) in gave], concat_dim))


def all_to_all_v(gave, me):
    """Flat elements in the numbers that sender and receiver name; one of no meaning for none."""
    parts = []
    for sender, (flat, send, _) in enumerate(gave):
        start = send[:me].sum()
        parts.append(flat[start : start + send[me]])
        assert len(parts[-1]) == gave[me][2][sender]
    joined = np.concatenate(parts)
    return Tensor(joined if joined.size else np.array([np.nan], np.float32))


def broadcast(root, gave, me):
    """A tuple in, a tuple out."""
    return tuple(Tensor(x) for x in gave[root])


class Send:
    def __init__(self, network, sr_tag, dest_rank, group):
        assert group == "theirs"
        self.network, self.to, self.tag = network, dest_rank, sr_tag

    def __call__(self, x):
        net = self.network()
        net.letters[net.me, self.to, self.tag] = x.numpy()
        return Tensor(np.zeros(1, np.float32))


class Receive:
    def __init__(self, network, sr_tag, src_rank, shape, dtype, group):
        assert group == "theirs"
        self.network, self.sender, self.tag = network, src_rank, sr_tag
        self.shape, self.dtype = shape, dtype

    def __call__(self, x):
        net = self.network()
        letter = Tensor(net.letters.pop((self.sender, net.me, self.tag)))
        assert (list(letter.shape), letter.dtype) == (self.shape, self.dtype)
        return letter


@pytest.fixture
def network(monkeypatch):
    """Makes the network of a size, with the primitives in place."""
    made = []
    for name, meaning in (
        ("AllReduce", all_reduce),
        ("AllGather", all_gather),
        ("ReduceScatter", reduce_scatter),
        ("AlltoAll", all_to_all),
        ("AlltoAllV", all_to_all_v),
        ("Broadcast", broadcast),
    ):
        primitive = functools.partial(Primitive, lambda: made[0], meaning)
        monkeypatch.setattr(ascend.ops, name, primitive)
    for kind in (Send, Receive):
        monkeypatch.setattr(ascend.ops, kind.__name__, functools.partial(kind, lambda: made[0]))

    def make(size):
        made.append(Network(size))
        return made[0]

    return make


def numbers(rank, *shape):
    """Whole ones, whose sums are exact in any order."""
    return np.random.default_rng(rank).integers(-99, 99, shape).astype(np.float32)


DEFINITIONS = {
    "all_reduce": lambda gave, me: sum(gave),
    "all_gather": lambda gave, me: np.stack(gave),
    "reduce_scatter": lambda gave, me: sum(gave)[me],
    "all_to_all": lambda gave, me: np.stack([x[me] for x in gave]),
    "broadcast": lambda gave, me: gave[0],
}


@pytest.mark.parametrize("operation", DEFINITIONS)
def test_operations_of_equal_shapes(network, operation):
    size = 3
    gave = [numbers(rank, size, 2) for rank in range(size)]
    for me, got in enumerate(network(size).all(operation, [(x,) for x in gave])):
        want = DEFINITIONS[operation](gave, me)
        assert got.shape == want.shape
        np.testing.assert_array_equal(got, want)


def test_unequal_rows(network):
    """One member sends to itself, one to all, one gets nothing; zeros up to the room."""
    size, room, width = 3, 5, 2
    sent = np.array([[1, 0, 2], [0, 0, 1], [2, 0, 1]], np.int32)
    rows = [numbers(rank, 4, width) for rank in range(size)]
    gave = []
    for rank in range(size):
        arrives = (np.arange(room) < sent[:, rank].sum()).astype(np.float32)
        gave.append((rows[rank], sent[rank], sent[:, rank], arrives))
    for me, got in enumerate(network(size).all("all_to_all_v", gave)):
        starts = np.cumsum(sent, 1) - sent
        parts = [x[s[me] : s[me] + n[me]] for x, s, n in zip(rows, starts, sent, strict=True)]
        arrived = np.concatenate(parts)
        want = np.concatenate([arrived, np.zeros((room - len(arrived), width), np.float32)])
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("operation", "sender"), [("send_forward", 0), ("send_backward", 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_point_to_point(network, operation, sender, dtype):
    """Both have the sender's afterwards; only the sender's own is its message."""
    net = network(2)
    gave = [(numbers(rank, 3, 2).astype(dtype),) for rank in range(2)]
    for rank in (sender, 1 - sender):
        np.testing.assert_array_equal(net.call(operation, rank, gave), gave[sender][0])
    assert not net.letters


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
