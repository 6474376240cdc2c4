"""Stages of experts: what is added, what stays to the bit, what is trained and what is not."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file
from support.configs import TINY, model
from support.models import fill, next_labels

from mistral_ms.checkpoint import open_checkpoint, save_native
from mistral_ms.config import DROPLESS, RoutingConfig
from mistral_ms.errors import CheckpointError, ConfigError
from mistral_ms.mixtures.expand import add_experts, export_expert, import_expert, remove_experts
from mistral_ms.mixtures.lifelong import (
    CLOSED,
    visible,
)
from mistral_ms.models import CausalLM, DistillationObjective, Objective
from mistral_ms.models.distillation import divergence
from mistral_ms.moe import update_gates
from mistral_ms.weights import init_values, specs

CONFIG = model(**TINY, moe={"num_local_experts": 4}, torch_dtype="float32")
E, NEW = 4, 3
STACKED = ("router.weight", "experts.w1", "experts.w2", "experts.w3")


def drawn(config, seed=0):
    values = {spec.name: init_values(spec, seed) for spec in specs(config)}
    # logits of size one, so that the gate decides something
    return {n: v * 10 if n.endswith("router.weight") else v for n, v in values.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "old"
    values = drawn(CONFIG)
    tensors = [(n, v.shape, "float32", v) for n, v in values.items()]
    save_native(path, CONFIG, tensors, {"tokenizer.model": b"pieces"})
    return path


@pytest.fixture(scope="module")
def grown(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("grown") / "new"
    with open_checkpoint(base) as source:
        result = add_experts(source, path, NEW, opening_updates=4)
    assert (result.experts, result.frozen_experts) == (E + NEW, E)
    return path


def opened(path):
    with open_checkpoint(path) as source:
        return source.config, {name: source.read(name) for name in source.names()}


def loaded(path, routing=DROPLESS):
    config, values = opened(path)
    return fill(CausalLM(config, routing), values)


@pytest.fixture
def batch():
    ids = np.random.default_rng(2).integers(0, 48, (3, 8)).astype(np.int32)
    return Tensor(ids), Tensor(np.tile(np.arange(8, dtype=np.int32), (3, 1)))


def test_what_a_stage_adds(base, grown):
    """Old rows to the bit; new ones copies of them in turn; a bias that closes them."""
    (_, old), (config, new) = opened(base), opened(grown)
    assert config.moe.num_local_experts == E + NEW
    assert config.moe.gate.model_dump() == {
        "name": "staged_top_k", "frozen_experts": E, "visible_experts": None, "opening_updates": 4,
    }  # fmt: skip
    assert (grown / "tokenizer.model").read_bytes() == b"pieces"
    for name, values in old.items():
        if name.split(".moe.")[-1] in STACKED:
            np.testing.assert_array_equal(new[name][:E], values)
            np.testing.assert_array_equal(new[name][E:], values[:NEW])
        else:
            np.testing.assert_array_equal(new[name], values)
    bias = {n: v for n, v in new.items() if n not in old}
    assert set(bias) == {f"layers.{i}.moe.router.opening_bias" for i in range(2)}
    for values in bias.values():
        np.testing.assert_array_equal(values, [0] * E + [CLOSED] * NEW)


def test_masked_routing_is_the_old_model_to_the_bit(base, grown, batch):
    """Whatever the new experts are; scrambled here. With all visible the outputs differ."""
    before = loaded(base)(*batch).asnumpy()
    config, values = opened(grown)
    rng = np.random.default_rng(3)
    for name, array in values.items():
        if name.split(".moe.")[-1] in STACKED:
            array[E:] = rng.normal(0, 5, array[E:].shape)
        elif name.endswith("opening_bias"):
            array[E:] = 3.0
    masked = fill(CausalLM(visible(config, E)), values)
    np.testing.assert_array_equal(masked(*batch).asnumpy(), before)
    seeing = fill(CausalLM(config), values)
    assert np.abs(seeing(*batch).asnumpy() - before).max() > 0.01


def test_closed_experts_leave_the_first_step_unchanged(base, grown, batch):
    """All experts visible: the softmax has more terms, all of them zero."""
    before, after = loaded(base)(*batch).asnumpy(), loaded(grown)(*batch).asnumpy()
    # sums over 7 instead of 4 probabilities may be added up in another order
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def test_experts_open_by_updates(grown, batch):
    """Four updates, whatever was routed; then tokens choose new experts."""
    open_now = loaded(grown)
    layers = dict(enumerate(open_now.layers))
    for update in range(1, 6):
        update_gates(layers, (0, 1), np.ones((2, E + NEW), np.float32))
        bias = open_now.weights()["layers.1.moe.router.opening_bias"].asnumpy()
        np.testing.assert_array_equal(bias[:E], 0)
        np.testing.assert_allclose(bias[E:], min(CLOSED * (1 - update / 4), 0), rtol=1e-6)
    routed = open_now.hidden_states(*batch)[1][1].asnumpy()
    assert routed[:, E:].sum() > 0


def test_old_experts_have_no_gradient(base, grown, batch):
    """With distillation, a capacity, and the new experts open; all else has one."""
    for policy in ("dropless", "capacity"):
        routing = RoutingConfig(policy=policy, capacity_factor=2.0)
        now = loaded(grown, routing=routing)
        held = now.weights()
        for name, parameter in held.items():
            if name.endswith("opening_bias"):
                parameter.set_data(ms.ops.zeros_like(parameter))
        objective = DistillationObjective(now, loaded(base), 0.5, router_aux_loss_coef=0.01)
        ids, places = batch
        labels = Tensor(next_labels(ids.asnumpy(), places.asnumpy()))
        trained = [p for p in held.values() if p.requires_grad]
        assert len(trained) == len(held) - 2
        found = ms.grad(Total(objective), None, trained)(ids, labels, places)
        for name, gradient in zip(
            (n for n, p in held.items() if p.requires_grad), found, strict=True
        ):
            values = gradient.asnumpy()
            if name.split(".moe.")[-1] in STACKED:
                assert not values[:E].any(), name
                assert values[E:].any(), name
            else:
                assert values.any(), name
        assert not any(p.requires_grad for p in objective.before.get_parameters())


class Total(ms.nn.Cell):
    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def construct(self, *batch):
        return self.objective(*batch)[0]


def test_the_distance(base, batch):
    """KL in NumPy, its gradient p_now - p_before, and how the objective weighs it."""
    rng = np.random.default_rng(6)
    old, new = rng.normal(0, 2, (2, 5, 7)).astype(np.float32)
    p, q = (
        np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(-1, keepdims=True) for x in (old, new)
    )
    want = (p * (np.log(p) - np.log(q))).sum(-1)
    found = divergence(Tensor(old), Tensor(new)).asnumpy()
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    grads = ms.grad(lambda a, b: divergence(a, b).sum(), (0, 1))(Tensor(old), Tensor(new))
    np.testing.assert_array_equal(grads[0].asnumpy(), 0)
    np.testing.assert_allclose(grads[1].asnumpy(), q - p, rtol=1e-4, atol=2e-5)
    ids, places = batch
    labels = Tensor(next_labels(ids.asnumpy(), places.asnumpy()))
    now, before = loaded(base), loaded(base)
    weight = now.weights()["lm_head.weight"]
    weight.set_data(weight * 3)
    objective = DistillationObjective(now, before, 0.7)
    total, parts = objective(ids, labels, places)
    plain, _ = Objective(now)(ids, labels, places)
    logits = [m(ids, places).asnumpy()[:, :-1].astype(float) for m in (before, now)]
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits]
    distance = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    np.testing.assert_allclose(float(total) - float(plain), 0.7 * distance, rtol=1e-4)
    assert (objective.others, objective.measures) == ((), ("distillation",))
    np.testing.assert_allclose(float(parts[-1]), distance, rtol=1e-4)


def test_fresh_experts_are_drawn(base, tmp_path):
    with open_checkpoint(base) as source:
        add_experts(source, tmp_path / "fresh", 2, "fresh", freeze=False, closed=False)
    (_, old), (config, new) = opened(base), opened(tmp_path / "fresh")
    assert config.moe.gate.frozen_experts == 0
    w1 = new["layers.0.moe.experts.w1"]
    assert abs(w1[E:].std() / 0.1 - 1) < 4 / np.sqrt(2 * w1[E:].size)  # four standard errors
    assert np.abs(w1[4] - w1[5]).max() > 0.1
    assert not new["layers.0.moe.router.opening_bias"].any()
    np.testing.assert_array_equal(w1[:E], old["layers.0.moe.experts.w1"])


def test_training_the_old_ones_thaws_those_of_earlier_stages(grown, tmp_path):
    with open_checkpoint(grown) as source:
        result = add_experts(source, tmp_path / "all", 1, freeze=False)
    assert (result.experts, result.frozen_experts) == (E + NEW + 1, 0)


def test_removing_what_was_added_is_the_old_model(base, grown, tmp_path, batch):
    with open_checkpoint(grown) as source:
        result = remove_experts(source, tmp_path / "back", range(E, E + NEW))
    assert (result.experts, result.frozen_experts) == (E, E)
    back, old = loaded(tmp_path / "back"), loaded(base)
    np.testing.assert_array_equal(back(*batch).asnumpy(), old(*batch).asnumpy())
    with open_checkpoint(grown) as source:
        remove_experts(source, tmp_path / "some", [1, 5])
    config, values = opened(tmp_path / "some")
    assert config.moe.gate.frozen_experts == E - 1
    w2 = opened(grown)[1]["layers.1.moe.experts.w2"]
    np.testing.assert_array_equal(values["layers.1.moe.experts.w2"], w2[[0, 2, 3, 4, 6]])


def test_an_expert_travels_as_a_file(base, grown, tmp_path):
    with open_checkpoint(grown) as source:
        written = export_expert(source, tmp_path / "two.safetensors", 2)
    held, (_, values) = load_file(tmp_path / "two.safetensors"), opened(grown)
    assert written == sum(v.nbytes for v in held.values())
    assert set(held) == {f"layers.{i}.moe.{kind}" for i in range(2) for kind in STACKED}
    for name, array in held.items():
        np.testing.assert_array_equal(array, values[name][2])
    with open_checkpoint(base) as source:
        import_expert(source, tmp_path / "two.safetensors", tmp_path / "five")
    config, values = opened(tmp_path / "five")
    assert config.moe.num_local_experts == E + 1
    for name, array in held.items():
        np.testing.assert_array_equal(values[name][E], array)


def test_bits_of_bfloat16_stay(tmp_path):
    """Copied rows are moved, not converted; and a stage can follow a stage."""
    values = drawn(CONFIG)
    halves = {n: (v.view(np.uint32) >> 16).astype(np.uint16) for n, v in values.items()}
    tensors = [(n, v.shape, "bfloat16", v) for n, v in halves.items()]
    save_native(tmp_path / "a", CONFIG.model_copy(update={"torch_dtype": "bfloat16"}), tensors)
    for src, dst in (("a", "b"), ("b", "c")):
        with open_checkpoint(tmp_path / src) as source:
            add_experts(source, tmp_path / dst, 1)
    with open_checkpoint(tmp_path / "c") as source:
        name = "layers.0.moe.experts.w3"
        found = source.read(name, "keep")
        np.testing.assert_array_equal(found, halves[name][[0, 1, 2, 3, 0, 0]])
        assert source.dtype("layers.0.moe.router.opening_bias") == "float32"
        assert source.config.moe.gate.frozen_experts == 5


def test_what_is_refused(base, tmp_path):
    other = model(**{**TINY, "intermediate_size": 20}, moe={"num_local_experts": 4})
    save_native(
        tmp_path / "other", other, [(n, v.shape, "float32", v) for n, v in drawn(other).items()]
    )
    with open_checkpoint(tmp_path / "other") as source:
        export_expert(source, tmp_path / "narrow", 0)
    with open_checkpoint(base) as source:
        for call, message in (
            (lambda: add_experts(source, tmp_path / "x", 0), "impossible count: count: 0"),
            (lambda: remove_experts(source, tmp_path / "x", [4]), "no such experts: experts: 4"),
            (lambda: remove_experts(source, tmp_path / "x", [0, 1, 2]), "num_experts_per_tok"),
            (lambda: export_expert(source, tmp_path / "x", 9), "no such experts: expert: 9"),
        ):
            with pytest.raises(ConfigError, match=message):
                call()
        with pytest.raises(CheckpointError, match=r"another model's expert: .*narrow: layers\.0"):
            import_expert(source, tmp_path / "narrow", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    staged = model(**TINY, moe={"num_local_experts": 4, "gate": "staged_top_k"})
    for settings in ({"frozen_experts": 5}, {"visible_experts": 1}):
        gate = staged.moe.gate.model_copy(update=settings)
        moe = staged.moe.model_copy(update={"gate": gate})
        with pytest.raises(ConfigError, match="impossible stages"):
            specs(staged.model_copy(update={"moe": moe}))
