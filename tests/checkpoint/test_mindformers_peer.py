"""Against MindFormers' own Mixtral of 1.x: names, shapes, files, logits. It runs in one process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy

from mistral_ms.checkpoint import convert, open_checkpoint
from mistral_ms.checkpoint.keys import MINDFORMERS, MINDFORMERS_GMM
from mistral_ms.checkpoint.layout import format_layout
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.config import DROPLESS, RoutingConfig
from mistral_ms.models import CausalLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("mindformers") is None,
        reason="MindFormers, the oracle, is not installed",
    ),
]
PEER = Path(__file__).with_name("mindformers_peer.py")


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """Its directory, with what it found and its logits."""
    path = tmp_path_factory.mktemp("peer")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, str(PEER), str(path)],
        cwd=path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return path, json.loads((path / "found.json").read_text()), np.load(path / "arrays.npz")


def test_names_and_shapes_are_those_of_their_classes(peer):
    """Of both layouts; the caches of inference are no weights."""
    path, found, _ = peer
    with open_checkpoint(path / "pretrained") as source:
        config = source.config
    for layout, table in (("fused", MINDFORMERS), ("gmm", MINDFORMERS_GMM)):
        theirs = {n: tuple(shape) for n, (shape, _) in found[layout].items() if "_cache" not in n}
        assert theirs == format_layout(config, table).shapes


@pytest.mark.parametrize("policy", ["dropless", "token_major", "choice_major"])
def test_the_same_logits_from_their_weights(peer, policy):
    """With a capacity of 1.1 both drop the same tokens, in either order."""
    path, _, arrays = peer
    routing = DROPLESS
    if policy != "dropless":
        routing = RoutingConfig(policy="capacity", capacity_factor=1.1, drop_priority=policy)
        assert np.abs(arrays[policy] - arrays["dropless"]).max() > 1e-2
    with open_checkpoint(path / "pretrained") as source:
        model = CausalLM(source.config, routing, positions=16)
        load_weights(source, model.weights())
    ids = arrays["ids"]
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), ids.shape).copy()
    model.set_train(False)
    ours = model(ms.Tensor(ids), ms.Tensor(positions)).asnumpy()
    # float32 products in another order: some 1e-6 of logits near 4; a dropped token is 1e-2
    np.testing.assert_allclose(ours, arrays[policy], atol=1e-5 * np.abs(ours).max(), rtol=0)


def test_they_load_what_we_write(peer):
    """Each container and layout whole, with the same logits to the bit; with our yaml file too."""
    _, found, arrays = peer
    for file in ("fused/mindspore_model.safetensors", "back/mindspore_model.ckpt"):
        assert found[f"left out of {file}"] == []
        assert np.array_equal(arrays[file], arrays["dropless"])
    assert np.array_equal(arrays["from_pretrained"], arrays["dropless"])
    assert all("_cache" in name for name in found["left out of gmm"])


def test_ckpt_ours_ckpt_keeps_every_bit(peer):
    path, _, _ = peer
    (theirs,) = (path / "pretrained").glob("*.ckpt")
    back = ms.load_checkpoint(str(path / "back" / "mindspore_model.ckpt"))
    before = ms.load_checkpoint(str(theirs))
    assert sorted(back) == sorted(before)
    for name, parameter in before.items():
        assert (parameter.dtype, parameter.shape) == (back[name].dtype, back[name].shape)
        assert parameter.asnumpy().tobytes() == back[name].asnumpy().tobytes(), name


@pytest.mark.parametrize("container", ["ckpt", "safetensors"])
def test_what_a_training_of_theirs_leaves(peer, tmp_path, container):
    """The optimizer's state and counters lie in the same file; the yaml file beside it."""
    path, _, _ = peer
    (config,) = (path / "pretrained").glob("*.yaml")
    file = path / "trained" / f"mixtral_rank_0-1_3.{container}"
    (file.parent / "run.yaml").write_bytes(config.read_bytes())
    result = convert(file, tmp_path / "ours")
    assert {"global_step", "moment1.lm_head.weight", "epoch_num"} < set(result.skipped)
    ours, expected = (
        safetensors.numpy.load_file(next(each.glob("*.safetensors")))
        for each in (tmp_path / "ours", path / "ours")
    )
    assert ours.keys() == expected.keys()
    assert all(np.array_equal(ours[name], expected[name]) for name in ours)
