"""The examples of docs/extending.md do what the page says."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from safetensors.numpy import load_file
from support.hf import BASE, hf_logits, make_pair
from support.models import fill, next_labels, ragged_batch
from support.moe import moe_config
from support.routing import softmax
from support.updates import STEPS, Ours, start_values, training
from transformers import LlamaConfig, LlamaForCausalLM

import mistral_ms
from mistral_ms.checkpoint import convert, open_checkpoint
from mistral_ms.checkpoint import converter as written
from mistral_ms.checkpoint.load import load_weights, set_values
from mistral_ms.config import (
    DROPLESS,
    MoEArchitecture,
    ParallelConfig,
    RoutingConfig,
    RunConfig,
    TrainingConfig,
    routes,
)
from mistral_ms.config import gates as gate_settings
from mistral_ms.config import hugging_face_keys as known
from mistral_ms.config.layout import Sizes
from mistral_ms.datasets import Batch
from mistral_ms.errors import ConfigError
from mistral_ms.models import CausalLM
from mistral_ms.moe import gate_context, make_gate
from mistral_ms.moe.gates import base as gates
from mistral_ms.optimizers import registry
from mistral_ms.parallel.collectives import Collectives, Groups
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.parallel.dispatchers import FlatRoute, make_dispatcher, register_route
from mistral_ms.parallel.dispatchers import registry as route_kinds
from mistral_ms.parallel.topology import GroupKind, Topology
from mistral_ms.training import TrainStep, make_objective
from mistral_ms.training.graph_step import GraphTrainStep
from mistral_ms.weights import gates as gate_parameters

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
RANDOM = Tensor(np.array([[1, 5, 0], [1, 5, 1]], np.int32))
"""Of two rows: seed, step, and number of the row."""
RELATIVE = 2e-5
"""Of a logit difference over the largest logit: the promise to Hugging Face's models."""


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """From a section to the module that its Python blocks make; a file, for graphs are compiled
    from sources.
    """
    monkeypatch.syspath_prepend(str(tmp_path))

    def module(title):
        (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
        blocks = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
        name = f"example_{title.replace(' ', '_').replace('-', '_').lower()}"
        (tmp_path / f"{name}.py").write_text("\n\n".join(blocks))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return module


@pytest.fixture
def tables(monkeypatch):
    """Everything that the examples enter themselves into is as before afterwards."""
    for table in (known.ARCHITECTURES, known.HF_CLASS_DEFAULTS, written._FORMATS):
        for name in ("llama", "torchtune"):
            monkeypatch.setitem(table, name, None)
            monkeypatch.delitem(table, name)
    monkeypatch.setattr(registry, "_OPTIMIZERS", dict(registry._OPTIMIZERS))
    monkeypatch.setattr(gate_settings, "_SETTINGS", dict(gate_settings._SETTINGS))
    monkeypatch.setattr(routes, "_RULES", dict(routes._RULES))
    monkeypatch.setattr(route_kinds, "_KINDS", dict(route_kinds._KINDS))
    for known_gates in (gate_parameters._GATES, gates._GATES):
        monkeypatch.setattr(known_gates, "_entries", dict(known_gates._entries))
    return monkeypatch


def test_a_gate(tables, examples):
    """Choices under noise and pressure, weights, and the next pressure against NumPy."""
    examples("A gate")
    moe = MoEArchitecture(num_local_experts=4, gate={"name": "pressed_top_k", "rate": 0.5})
    config = moe_config(E=4).model_copy(update={"moe": moe})
    gate, rng = make_gate(config, DROPLESS), np.random.default_rng(2)
    weight, pressure = (rng.normal(size=size).astype(np.float32) for size in ((4, 6), 4))
    gate.weight.set_data(Tensor(weight))
    gate.pressure.set_data(Tensor(pressure))
    # The tolerances are float32's: six products in a logit, one exponential, and a square whose
    # logit may be near zero.
    x, context = rng.normal(size=(6, 6)).astype(np.float32), gate_context(RANDOM, 3)
    logits = x @ weight.T
    noisy = logits + gate.normal(context).numpy()
    for noise, given in ((noisy, context), (logits, None)):
        weights, experts, scores, _, (squares,) = gate(Tensor(x), given)
        np.testing.assert_array_equal(experts.numpy(), np.argsort(pressure - noise, -1)[:, :2])
        np.testing.assert_allclose(scores.numpy(), softmax(logits), rtol=1e-5)
        np.testing.assert_array_equal(
            weights.numpy(), np.take_along_axis(scores.numpy(), experts.numpy(), -1)
        )
        np.testing.assert_allclose(squares.numpy(), noise**2, rtol=1e-4, atol=1e-5)
    gate.update(np.array([4, 2, 0, 2], np.float32))
    np.testing.assert_allclose(gate.pressure.numpy(), pressure + np.float32([0.5, 0, -0.5, 0]))


@pytest.mark.parametrize("graph", [False, True], ids=["pynative", "graph"])
def test_an_optimizer(tables, examples, graph):
    """A dozen steps against a loop; signs agree, so only the decay is rounded."""
    examples("An optimizer")
    rate, decay, momentum = 1e-2, 0.1, 0.8
    config = {"name": "signum", "weight_decay": decay, "momentum": momentum}
    start = start_values()
    ours = Ours(training(config), start)
    want = {name: values.astype(np.float64) for name, values in start.items()}
    buffers = {name: np.zeros_like(values) for name, values in want.items()}
    rng = np.random.default_rng(3)
    for step in range(STEPS):
        gradients = {n: rng.standard_normal(v.shape).astype(np.float32) for n, v in start.items()}
        got = ours.step(gradients, step, rate, graph)
        for name, weight in want.items():
            buffers[name] = momentum * buffers[name] + (1 - momentum) * gradients[name]
            left = 1 - rate * decay * (weight.ndim > 1)
            want[name] = weight * left - rate * np.sign(buffers[name])
    for name, weight in want.items():
        # A dozen roundings of float32, each of half a unit in the last place.
        np.testing.assert_allclose(got[name], weight, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("execution", ["explicit", "graph"])
def test_an_objective(examples, execution):
    """Loss and gradient norm of a step are those of torch's label smoothing and HF's model."""
    pair = make_pair("mistral-sliding-window", num_hidden_layers=1)
    config = TrainingConfig(max_steps=1, global_batch_size=2, seq_length=8, max_grad_norm=1e9)
    token_nll = examples("An objective").SmoothedNLL()
    if execution == "graph":
        run = RunConfig(model=pair.config, training=config, parallel={"execution": "graph"})
        step = GraphTrainStep(run, ParallelContext(run.parallel), False, token_nll)
        for name, values in pair.weights().items():
            set_values(step.held()[name], step.storage.to_parameter(name, values.copy()))
    else:
        model = fill(CausalLM(pair.config), pair.weights())
        step = TrainStep(make_objective(model, config, token_nll=token_nll), config)
    ids, positions = ragged_batch([8, 5], BASE["vocab_size"])
    labels = next_labels(ids, positions)
    batch = Batch(ids, labels, positions, np.zeros_like(ids), np.arange(2, dtype=np.int32))
    result = step(batch)
    mask = torch.tensor(positions >= 0).long()
    logits = pair.hf(torch.tensor(ids).long(), attention_mask=mask).logits.flatten(0, 1)
    want = torch.nn.functional.cross_entropy(
        logits, torch.tensor(labels).long().ravel(), label_smoothing=0.1
    )
    want.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in pair.hf.parameters()))
    # float32 on both sides, the gradients through all layers
    assert result.loss == pytest.approx(want.item(), rel=1e-5)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_an_objective_of_divided_logits_is_refused(examples):
    """What the page says of tensor parallelism."""
    context = SimpleNamespace(
        parallel=ParallelConfig(mp=2, micro_batch_interleave_num=1),
        token_nll=lambda config: object(),
    )
    model = SimpleNamespace(config=None)
    config = TrainingConfig(max_steps=1, global_batch_size=2, seq_length=8)
    with pytest.raises(ConfigError, match=r"parallel\.mp: 2 with a loss of tokens of one's own"):
        make_objective(model, config, parallel_context=context, token_nll=object())


def test_a_file_in_the_package_is_all(tmp_path):
    """A gate and a route that lie where the page says are known by their names."""
    package = Path(mistral_ms.__file__).parent
    shutil.copytree(package, tmp_path / "mistral_ms", ignore=shutil.ignore_patterns("__pycache__"))
    for title in ("A gate", "An all-to-all route"):
        (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
        path, block = re.search(
            r"^`([^`]*\.py)`:\n\n```python\n(.*?)^```$", section, re.M | re.S
        ).groups()
        (tmp_path / path).write_text(block)
    code = (
        "from mistral_ms.config import ParallelConfig, when_unknown\n"
        "from mistral_ms.config.gates import gate_settings\n"
        "from mistral_ms.shipped import import_shipped\n"
        "when_unknown(import_shipped)\n"
        "assert ParallelConfig(dp=2, ep=2, all_to_all='piecewise').rules().route is not None\n"
        "assert gate_settings('pressed_top_k').rate == 0.01\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )


class Mirrored(Collectives):
    """Three members, of which the first and the last change what they have: its own inverse."""

    def all_to_all(self, x):
        return x.flip((0,))


def test_an_all_to_all_route(tables, examples):
    """The flat route's results, gradients and bytes, in twice as many messages."""
    topology = Topology(Sizes(3, 1, 1, 3))
    group = Mirrored(topology.group(GroupKind.EXPERT, 0), 0)
    module = examples("An all-to-all route")
    parallel = ParallelConfig(dp=3, ep=3, all_to_all="piecewise")
    groups = Groups(topology, 0)
    groups.of = lambda kind: group if kind is GroupKind.EXPERT else Collectives(group.group, 0)
    routing = RoutingConfig(policy="capacity")
    pieces = make_dispatcher(3, routing, parallel, groups).route
    assert isinstance(pieces, module.PiecewiseRoute)
    with pytest.raises(ValueError, match="piecewise is registered twice"):
        register_route("piecewise", lambda groups, exchange: pieces)
    with pytest.raises(ConfigError, match=r"piecewise with routing\.policy=dropless"):
        make_dispatcher(3, DROPLESS, parallel, groups)
    flat = FlatRoute(group)
    rng = np.random.default_rng(4)
    x, factor = (Tensor(rng.standard_normal((3, 2, 5, 4)).astype(np.float32)) for _ in range(2))
    found = []
    for route in (flat, pieces):
        gradient = ms.grad(lambda x, route=route: (route.exchange(x) * factor).sum())(x)
        found.append((route.exchange(x).numpy(), gradient.numpy()))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    once, twice = flat.traffic(x.shape), pieces.traffic(x.shape)
    assert twice.bytes_inside == once.bytes_inside > 0
    assert twice.messages_inside == 2 * once.messages_inside > 0


def test_a_model_family(tables, examples, tmp_path):
    """A Llama with grouped queries gives Hugging Face's logits."""
    torch.manual_seed(5)
    theirs = LlamaForCausalLM(LlamaConfig(**BASE)).float().eval()
    theirs.save_pretrained(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llama"
    examples("A model family")
    with open_checkpoint(tmp_path / "hf") as source:
        model = CausalLM(source.config)
        load_weights(source, model.weights())
    ids, positions = ragged_batch([7, 4], BASE["vocab_size"])
    got = model(Tensor(ids), Tensor(positions)).numpy()
    pair = type("Pair", (), {"hf": theirs})
    want, real = hf_logits(pair, ids, positions), positions >= 0
    assert np.abs(got - want)[real].max() <= RELATIVE * np.abs(want[real]).max()


def test_a_checkpoint_format(tables, examples, tmp_path):
    """Every tensor of a converted model is the one that is made by hand."""
    pair = make_pair("mistral-sliding-window")
    pair.hf.save_pretrained(tmp_path / "hf")
    examples("A checkpoint format")
    detect = sys.modules["mistral_ms.checkpoint.detect"]  # the package has a function of the name
    tables.setattr(detect, "KINDS", (*detect.KINDS, "torchtune"))
    convert(tmp_path / "hf", tmp_path / "tune", to="torchtune")
    got = load_file(tmp_path / "tune" / "model.safetensors")
    want = {}
    for name, values in pair.weights().items():
        for ours, names in NAMES.items():
            name = name.replace(ours, names)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = BASE["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            rows, columns = values.shape
            halves = values.reshape(heads, 2, rows // heads // 2, columns)
            values = halves.transpose(0, 2, 1, 3).reshape(rows, columns)
        want[name] = values
    assert got.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values)


NAMES = {
    "embed_tokens": "tok_embeddings",
    "input_layernorm.weight": "sa_norm.scale",
    "post_attention_layernorm.weight": "mlp_norm.scale",
    "norm.weight": "norm.scale",
    "attention.": "attn.",
    "o_proj": "output_proj",
    "feed_forward": "mlp",
    "lm_head": "output",
}
"""From our names to torchtune's, written apart from the page."""
