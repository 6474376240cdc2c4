"""Checkpoints of Mixtral and Mistral that MindFormers 1.x has written, under its trainer of today.

The oracle renames, stacks and transposes by hand.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp

import mindspore as ms
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from mistral_ms.checkpoint import convert
from mistral_ms.errors import CheckpointError, ConfigError
from mistral_ms.mindformers import run
from mistral_ms.mindformers.resume import COUNTERS_FILE, lay_out

L, E, H, WIDE, V = 2, 3, 16, 24, 11
KEYS = dict(
    hidden_size=H, intermediate_size=WIDE, num_layers=L, num_heads=2, n_kv_heads=1, vocab_size=V,
    seq_length=8, rms_norm_eps=1e-5, theta=1e6, pad_token_id=-1,
)  # fmt: skip
EXPERTS = dict(expert_num=E, num_experts_chosen=2, routing_policy="TopkRouterV2")
STATE = ("adam_m.lm_head.weight", "adam_v.model.norm_out.weight")


@pytest.fixture(scope="module")
def mixtral():
    pytest.importorskip("mindformers.core", reason="MindFormers is not installed")
    from mistral_ms.mindformers import MixtralForCausalLM

    return MixtralForCausalLM


def pair(gmm: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The same weights by their names and by ours."""
    rng = np.random.default_rng(0)
    theirs, ours = {}, {}

    def put(their_name: str, our_name: str, *shape: int, expert: bool = False) -> None:
        values = rng.standard_normal(shape).astype(np.float32)
        ours[our_name] = values
        theirs[their_name] = values.transpose(0, 2, 1).copy() if gmm and expert else values

    put("model.tok_embeddings.embedding_weight", "embed_tokens.weight", V, H)
    for n in range(L):
        block, layer = f"model.layers.{n}", f"layers.{n}"
        put(f"{block}.attention_norm.weight", f"{layer}.input_layernorm.weight", H)
        put(f"{block}.attention.wq.weight", f"{layer}.attention.q_proj.weight", H, H)
        put(f"{block}.attention.wk.weight", f"{layer}.attention.k_proj.weight", H // 2, H)
        put(f"{block}.attention.wv.weight", f"{layer}.attention.v_proj.weight", H // 2, H)
        put(f"{block}.attention.wo.weight", f"{layer}.attention.o_proj.weight", H, H)
        put(f"{block}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", H)
        put(f"{block}.feed_forward.router.dense.weight", f"{layer}.moe.router.weight", E, H)
        for w, shape in (("w1", (E, WIDE, H)), ("w2", (E, H, WIDE)), ("w3", (E, WIDE, H))):
            names = f"{block}.feed_forward.ffn.{w}.weight", f"{layer}.moe.experts.{w}"
            put(*names, *shape, expert=True)
    put("model.norm_out.weight", "norm.weight", H)
    put("lm_head.weight", "lm_head.weight", V, H)
    return theirs, ours


def parameters(theirs: dict[str, np.ndarray]) -> dict[str, ms.Parameter]:
    """As MindFormers has read them, in another order, with what a training adds."""
    found = {name: ms.Parameter(ms.Tensor(theirs[name])) for name in reversed(theirs)}
    for name in STATE:
        found[name] = ms.Parameter(ms.Tensor(np.zeros(3, np.float32)))
    found["step_num"] = ms.Parameter(ms.Tensor(3, ms.int32))
    found["model.layers.0.feed_forward.router.router.topk_bias"] = ms.Parameter(
        ms.Tensor(np.zeros(E, np.float32))
    )
    return found


def save(theirs: dict[str, np.ndarray], file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    named = [{"name": name, "data": each} for name, each in parameters(theirs).items()]
    ms.save_checkpoint(named, str(file), format=file.suffix[1:])


def run_file(path: Path, **changes) -> dict:
    return {
        "run_mode": "eval",
        "load_checkpoint": str(path),
        "moe_config": dict(EXPERTS),
        "model": {
            "model_config": {"type": "MixtralConfig", **KEYS, **changes},
            "arch": {"type": "MixtralForCausalLM"},
        },
    }


def assert_same(model, ours: dict[str, np.ndarray]) -> None:
    weights = model.weights()
    assert weights.keys() == ours.keys()
    for name, values in ours.items():
        assert np.array_equal(weights[name].asnumpy(), values), name


@pytest.mark.parametrize("gmm", [False, True], ids=["fused", "gmm"])
@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_load_checkpoint_by_the_launcher(mixtral, tmp_path, gmm, ending):
    """Of a file of several steps, without a configuration beside it: the run's file has it."""
    theirs, ours = pair(gmm)
    file = tmp_path / "rank_0" / f"mixtral_rank_0-1_3.{ending}"
    save(theirs, file)
    save({name: values + 1 for name, values in theirs.items()}, file.with_stem("mixtral-1_4"))
    config = run_file(file) | {"auto_trans_ckpt": True}
    run.prepare(config)
    assert (config["load_checkpoint"], config["auto_trans_ckpt"]) == ("", False)
    keys = dict(config["model"]["model_config"])
    del keys["type"]
    model = mixtral(mixtral.config_class(**keys, moe_config=EXPERTS))
    assert_same(model, ours)
    with pytest.raises(CheckpointError, match=r"wrong shape: .*wk.*\[8, 16\]"):
        run.prepare(run_file(file, n_kv_heads=2))
    # a configuration beside it must agree with the run's: shapes do not tell theta
    described = run_file(file)
    described["model"]["arch"]["type"] = "LlamaForCausalLM"
    described["model"]["model_config"]["type"] = "LlamaConfig"
    (file.parent / "run.yaml").write_text(yaml.safe_dump(described))
    run.prepare(run_file(file))
    with pytest.raises(ConfigError, match=r"another model: model\.rope_theta: 10000\.0"):
        run.prepare(run_file(file, theta=1e4))


@pytest.mark.parametrize("gmm", [False, True], ids=["fused", "gmm"])
def test_load_checkpoint_by_their_trainer(mixtral, gmm):
    """Its hooks, with what it has read of safetensors (all modes) and of .ckpt (predict)."""
    theirs, ours = pair(gmm)
    keys = {"type": "MixtralConfig", **KEYS}  # the experts' number is nowhere in it
    found = mixtral.convert_weight_dict(parameters(theirs), model_config=keys)
    assert {name: each.shape for name, each in found.items()} == {
        name: values.shape for name, values in ours.items()
    }
    assert all(np.array_equal(found[name].asnumpy(), ours[name]) for name in ours)
    assert {mixtral.convert_name(name) for name in theirs} == set(ours)
    assert all(mixtral.convert_name(name) == name for name in (*STATE, *ours))
    model = mixtral(mixtral.config_class(**KEYS, moe_config=EXPERTS))
    again = model.fuse_weight_from_ckpt(parameters(theirs))
    assert all(np.array_equal(again[name].asnumpy(), ours[name]) for name in ours)
    assert model.fuse_weight_from_ckpt(again) is again  # ours already


def test_gaps_and_what_is_no_mixtral_are_refused(mixtral):
    theirs, _ = pair(False)

    def refuse(message: str, without: str | None = None, **more: np.ndarray) -> None:
        source = parameters({name: each for name, each in theirs.items() if name != without})
        source |= {name: ms.Parameter(ms.Tensor(each)) for name, each in more.items()}
        with pytest.raises(CheckpointError, match=message):
            mixtral.convert_weight_dict(source, model_config=KEYS)

    w2 = "model.layers.1.feed_forward.ffn.w2.weight"
    refuse(rf"missing tensor.*{w2}", without=w2)
    refuse("extra tensor.*model.x", **{"model.x": np.ones(2, np.float32)})
    refuse("wrong shape.*w2", **{w2: np.ones((E, H, H), np.float32)})
    refuse("biases are not read", **{"model.layers.0.attention.wq.bias": np.ones(H, np.float32)})
    bias = "model.layers.1.feed_forward.router.router.topk_bias"
    refuse("a bias on the router's scores", **{bias: np.ones(E, np.float32)})


@pytest.mark.parametrize("gmm", [False, True], ids=["fused", "gmm"])
def test_from_pretrained(mixtral, tmp_path, gmm):
    """A directory with the run's yaml file beside the weights, and a file with its configuration
    given.
    """
    theirs, ours = pair(gmm)
    save(theirs, tmp_path / "model" / "any_name.ckpt")
    described = run_file(tmp_path)
    described["model"]["arch"]["type"] = "LlamaForCausalLM"
    described["model"]["model_config"]["type"] = "LlamaConfig"
    (tmp_path / "model" / "run.yaml").write_text(yaml.safe_dump(described))
    model = mixtral.from_pretrained(str(tmp_path / "model"), seq_length=4)
    assert_same(model, ours)
    assert (model.config.seq_length, model.language_model.config.rope_theta) == (4, 1e6)
    save(theirs, tmp_path / "alone" / "model.safetensors")
    config = mixtral.config_class(**KEYS, moe_config=EXPERTS)
    assert_same(mixtral.from_pretrained(tmp_path / "alone", config=config), ours)


def test_what_several_processes_load(mixtral, tmp_path):
    """A whole checkpoint in the graph's forms, or parts of ranks; everything else is refused."""
    save(pair(False)[0], tmp_path / "model" / "any.safetensors")
    described = run_file(tmp_path)
    (tmp_path / "model" / "run.yaml").write_text(yaml.safe_dump(described))

    def take(path: Path, **changes) -> None:
        several = dict(use_parallel=True, load_ckpt_format="safetensors", auto_trans_ckpt=True)
        several |= {"run_mode": "train", "parallel": {"parallel_mode": 1}}
        config = {**run_file(path), **several, **changes}
        run.prepare(config)
        assert config["load_checkpoint"] == str(path)  # MindFormers' to load

    with pytest.raises(CheckpointError, match=r"to be converted: .*embed_tokens.*--layout graph"):
        take(tmp_path / "model")
    for dtype in ("keep", "bf16"):
        convert(tmp_path / "model", tmp_path / dtype, "mindformers", dtype, layout="graph")
    take(tmp_path / "keep")
    with pytest.raises(CheckpointError, match=r"BF16 .*: several processes read float32 .*fp32"):
        take(tmp_path / "bf16")
    with pytest.raises(ConfigError, match="auto_trans_ckpt"):
        take(tmp_path / "keep", auto_trans_ckpt=False)
    with pytest.raises(ConfigError, match="set load_ckpt_format: safetensors"):
        take(tmp_path / "keep", load_ckpt_format="ckpt")
    (tmp_path / "parts" / "rank_0").mkdir(parents=True)
    take(tmp_path / "parts", auto_trans_ckpt=False, resume_training=True)
    (tmp_path / "parts" / "rank_0" / "x-1_3.safetensors").write_bytes(b"")
    take(tmp_path / "parts" / "rank_0" / "x-1_3.safetensors", resume_training=True)


def test_a_file_that_their_trainer_wrote_of_our_models(mixtral, tmp_path, capsys):
    """With our names in it, and the optimizer's means. Of one process' directory the newest."""
    _, ours = pair(False)
    file = tmp_path / "rank_0" / "mixtral_rank_0-1_3.safetensors"
    save(ours, file)
    save({name: each + 1 for name, each in ours.items()}, file.with_stem("mixtral_rank_0-1_2"))
    for given in (file, file.parent, tmp_path):
        config = run_file(given)
        run.prepare(config)
        keys = {**config["model"]["model_config"], "moe_config": EXPERTS}
        assert keys["weights_from"] == str(file)
        said = f"load_checkpoint: {file}, the newest of {given}\n"
        assert capsys.readouterr().out.endswith(said) == (given != file)
    del keys["type"]
    assert_same(mixtral(mixtral.config_class(**keys)), ours)
    (tmp_path / "rank_1").mkdir()  # parts, perhaps
    with pytest.raises(CheckpointError):
        run.prepare(run_file(tmp_path))


def training(ours: dict[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
    """What MindFormers' trainer saves of one of ours."""
    moments = {f"{m}.{name}": a for m in ("adam_m", "adam_v") for name, a in ours.items()}
    counters = {"step_num": step, "epoch_num": 1, "loss_scale": 65536.0, "global_batch_size": 2}
    return {**ours, **moments, **{k: np.array(v) for k, v in counters.items()}}


def test_a_training_is_found_or_refused(mixtral, tmp_path):
    """The newest of a directory by the steps in it, for names count from 1 again when a training
    goes on; a named one; in either container.
    """
    _, ours = pair(False)
    for name, step, ending in ((2, 12, "safetensors"), (8, 8, "safetensors"), (4, 4, "ckpt")):
        file = tmp_path / "checkpoint" / "rank_0" / f"mixtral_rank_0-1_{name}.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        named = [{"name": n, "data": ms.Tensor(a)} for n, a in training(ours, step).items()]
        ms.save_checkpoint(named, str(file), format=ending)
    place = tmp_path / "checkpoint" / "rank_0"

    def resumed(path: Path, name: bool | str = True, **changes) -> str:
        config = run_file(path) | {"run_mode": "train", "resume_training": name, **changes}
        run.prepare(config)
        assert config["resume_training"] is True
        found = Path(config["load_checkpoint"])
        assert found.parent == place
        laid_out = lay_out(found, Path(mkdtemp(dir=tmp_path)))
        held = {}
        for file in laid_out.iterdir():  # as MindFormers does
            held |= load_file(file)
        assert held["step_num"] == {"2": 12, "8": 8, "4": 4}[found.stem[-1]]
        assert {name for name in held if "." in name} == {
            f"{prefix}{name}" for prefix in ("", "adam_m.", "adam_v.") for name in ours
        }
        assert np.array_equal(held["adam_v.norm.weight"], ours["norm.weight"])
        assert load_file(laid_out / COUNTERS_FILE).keys() == {
            *("step_num", "epoch_num", "loss_scale", "global_batch_size")
        }
        return found.name

    assert resumed(tmp_path / "checkpoint") == "mixtral_rank_0-1_2.safetensors"
    assert resumed(place) == "mixtral_rank_0-1_2.safetensors"
    assert resumed(place / "mixtral_rank_0-1_4.ckpt") == "mixtral_rank_0-1_4.ckpt"
    name = "mixtral_rank_0-1_8.safetensors"
    assert resumed(tmp_path / "checkpoint", name) == name
    with pytest.raises(CheckpointError, match=r"no such file: resume_training .*x\.ckpt"):
        resumed(tmp_path / "checkpoint", "x.ckpt")
    with pytest.raises(CheckpointError, match=r"exp_avg\.embed_tokens\.weight: missing"):
        resumed(place, optimizer={"type": "AdamW", "use_fused": True})
    newest = place / "mixtral_rank_0-1_2.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"1_2\.safetensors"):
        resumed(place)  # half-written: the one before is not taken in silence
    weights = tmp_path / "weights" / "rank_0" / "mixtral_rank_0-1_3.safetensors"
    save(ours, tmp_path / "weights" / "x.safetensors")
    weights.parent.mkdir()
    (tmp_path / "weights" / "x.safetensors").rename(weights)
    with pytest.raises(CheckpointError, match=r"adam_m\.embed_tokens\.weight: missing: .*False"):
        resumed(tmp_path / "weights")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no training: .* end in -EPOCH_STEP\.safetensors"):
        resumed(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="no such file"):
        resumed(tmp_path / "absent")
