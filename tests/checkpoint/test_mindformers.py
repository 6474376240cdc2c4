"""MindFormers' checkpoints: every way round, and whatever may lie in their place.

The oracle renames and stacks Hugging Face's tensors by hand; MindSpore writes and reads the files.
Against MindFormers' own classes: ``test_mindformers_peer.py``.
"""

import json
import re

import mindspore as ms
import numpy as np
import pytest
import torch
import yaml
from mindspore import Parameter, Tensor
from safetensors.torch import load_file, save_file

from mistral_ms.checkpoint import convert, detect, inspect, open_checkpoint
from mistral_ms.config import load_run_config
from mistral_ms.errors import CheckpointError, ConfigError

LAYERS, EXPERTS = 3, 4
RENAMED = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.norm.weight": "model.norm_out.weight",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "block_sparse_moe.gate": "feed_forward.router.dense",
}
W1 = "model.layers.1.feed_forward.ffn.w1.weight"


def theirs(state, gmm=False):
    """Hugging Face's state dict as MindFormers has it."""
    renamed = {}
    for name, tensor in state.items():
        if ".experts." in name:
            continue
        for hf, mindformers in RENAMED.items():
            name = name.replace(hf, mindformers)
        renamed[name] = tensor
    for layer in range(LAYERS):
        for w in ("w1", "w2", "w3"):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts"
            if f"{prefix}.0.{w}.weight" in state:
                each = [state[f"{prefix}.{e}.{w}.weight"] for e in range(EXPERTS)]
                stacked = torch.stack([matrix.T if gmm else matrix for matrix in each])
                renamed[f"model.layers.{layer}.feed_forward.ffn.{w}.weight"] = stacked
    return renamed


def run_file(config, **changes):
    """The yaml file of a run: what is of the model, among what is not."""
    model = {
        "type": "LlamaConfig",
        "batch_size": 1,
        "seq_length": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "compute_dtype": "bfloat16",
        "use_flash_attention": True,
        **changes,
    }
    run = {
        "seed": 0,
        "runner_config": {"epochs": 2, "batch_size": 1},
        "model": {"model_config": model, "arch": {"type": "LlamaForCausalLM"}},
    }
    if hasattr(config, "num_local_experts"):
        run["moe_config"] = {
            "expert_num": config.num_local_experts,
            "num_experts_chosen": config.num_experts_per_tok,
            "routing_policy": "TopkRouterV2",
            "capacity_factor": 1.1,
        }
    return run


def save_ckpt(state, file):
    parameters = []
    for name, tensor in state.items():
        value = Tensor(tensor.float().numpy())
        value = value.astype(ms.bfloat16) if tensor.dtype == torch.bfloat16 else value
        parameters.append({"name": name, "data": Parameter(value, name=name)})
    ms.save_checkpoint(parameters, str(file))


def read_ckpt(file):
    return {
        name: torch.from_numpy(p.astype(ms.float32).asnumpy()).to(
            torch.bfloat16 if p.dtype == ms.bfloat16 else torch.float32
        )
        for name, p in ms.load_checkpoint(str(file)).items()
    }


@pytest.fixture
def make(tmp_path, foreign):
    """Makes a directory as a user of MindFormers has it."""

    def maker(kind="mixtral", gmm=False, name="mixtral_rank_0-1_2.safetensors", dtype=None, **more):
        model = foreign.model(kind, dtype or torch.bfloat16)
        path = tmp_path / f"{kind}-{'gmm' if gmm else 'fused'}"
        path.mkdir()
        state = {n: t.contiguous() for n, t in theirs(model.state_dict(), gmm).items()} | more
        if name.endswith(".ckpt"):
            save_ckpt(state, path / name)
        else:
            save_file(state, path / name, metadata={"format": "ms", "remove_redundancy": "False"})
        (path / "run.yaml").write_text(yaml.safe_dump(run_file(model.config)))
        return path

    return maker


@pytest.mark.parametrize("gmm", [False, True], ids=["fused", "gmm"])
@pytest.mark.parametrize("name", ["any_name.ckpt", "mixtral_rank_0-1_2.safetensors"])
def test_mixtral_there_and_back(tmp_path, make, foreign, assert_same_bits, gmm, name):
    """Theirs -> ours -> theirs keeps every bit, and ours is what Hugging Face's becomes."""
    path = make(gmm=gmm, name=name)
    result = convert(path, tmp_path / "ours")
    assert (result.source_kind, result.target_kind) == ("mindformers", "mistral_ms")
    hf = foreign.hf(tmp_path / "hf", "mixtral", torch.bfloat16)
    convert(hf, tmp_path / "expected")
    assert_same_bits(foreign.read(tmp_path / "expected"), foreign.read(tmp_path / "ours"))
    container = name.rpartition(".")[2]
    layout = "gmm" if gmm else None
    convert(tmp_path / "ours", tmp_path / "back", "mindformers", layout=layout, container=container)
    (back,) = (tmp_path / "back").glob(f"*.{container}")
    if container == "ckpt":
        assert_same_bits(read_ckpt(back), read_ckpt(path / name))
    else:
        assert_same_bits(load_file(back), load_file(path / name))
    with open_checkpoint(tmp_path / "back") as one, open_checkpoint(path) as two:
        same = one.config.model_copy(update={"pad_token_id": two.config.pad_token_id})
        assert same == two.config


def test_dense_mistral_between_the_formats(tmp_path, make, foreign, assert_same_bits):
    path = make("multi_query")
    convert(path, tmp_path / "hf", "hf")
    hf = foreign.hf(tmp_path / "expected", "multi_query", torch.bfloat16)
    assert_same_bits(foreign.read(hf), foreign.read(tmp_path / "hf"))
    with pytest.raises(ConfigError, match=r"not expressible in MindFormers' .*sliding_window: 8: "):
        convert(foreign.hf(tmp_path / "window", "mistral"), tmp_path / "no", "mindformers")
    with pytest.raises(ConfigError, match=r"not expressible in MindFormers' .*head_dim: 24: "):
        convert(foreign.hf(tmp_path / "dim", "head_dim"), tmp_path / "no", "mindformers")


def test_layouts_into_each_other(tmp_path, make, assert_same_bits):
    path = make()
    convert(path, tmp_path / "gmm", "mindformers", layout="gmm")
    convert(tmp_path / "gmm", tmp_path / "fused", "mindformers")
    (file,) = path.glob("*.safetensors")
    back = load_file(tmp_path / "fused" / "mindspore_model.safetensors")
    assert_same_bits(load_file(file), back)
    assert "gmm: each transposed" in inspect(tmp_path / "gmm").layout
    written = yaml.safe_load((tmp_path / "gmm" / "mindspore_model.yaml").read_text())
    assert written["model"]["model_config"]["use_past"] is True


def test_equal_sizes_need_a_word(tmp_path, make):
    """A square matrix does not say on which side it lies."""
    side = 32
    path = make(gmm=True)
    (file,) = path.glob("*.safetensors")
    state = load_file(file)
    for name in state:
        if ".ffn.w" in name:
            state[name] = (
                torch.arange(EXPERTS * side * side).reshape(EXPERTS, side, side).bfloat16()
            )
    save_file(state, file)
    run = yaml.safe_load((path / "run.yaml").read_text())
    run["model"]["model_config"]["intermediate_size"] = side
    (path / "run.yaml").write_text(yaml.safe_dump(run))
    message = "layout of the experts is not clear.*both 32.*--from mindformers-fused"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)
    assert re.search(message, inspect(path).problem)
    values = {}
    for layout in ("fused", "gmm"):
        assert f"experts stacked ({layout}" in inspect(path, kind=f"mindformers-{layout}").layout
        with open_checkpoint(path, f"mindformers-{layout}") as source:
            values[layout] = source.read("layers.1.moe.experts.w1")
    assert np.array_equal(values["fused"], values["gmm"].transpose(0, 2, 1))
    assert not np.array_equal(values["fused"], values["gmm"])


def test_shards_with_their_index(tmp_path, make, assert_same_bits):
    """The index is the one that MindSpore's load_distributed_checkpoint reads."""
    path = make()
    convert(path, tmp_path / "parts", "mindformers", max_shard_bytes=20_000)
    index = tmp_path / "parts" / "param_name_map.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    state = {}
    for file in set(weight_map.values()):
        state |= load_file(tmp_path / "parts" / file)
    assert_same_bits(load_file(path / "mixtral_rank_0-1_2.safetensors"), state)
    assert len(set(weight_map.values())) > 2
    index.write_text(json.dumps(weight_map))  # as MindSpore wrote it before 2.5
    assert inspect(tmp_path / "parts").ok
    index.unlink()  # as MindFormers reads a directory
    assert inspect(tmp_path / "parts").ok
    next((tmp_path / "parts").glob("*00001*")).unlink()
    with pytest.raises(CheckpointError, match=r"missing tensor: .*embedding_weight"):
        open_checkpoint(tmp_path / "parts")


def test_steps_side_by_side_are_told_apart_by_the_file(tmp_path, make):
    for name in ("later.safetensors", "later.ckpt"):
        path = make(name=name)
        first = path / name.replace("later", "earlier")
        first.write_bytes((path / name).read_bytes())
        message = (
            r"several checkpoints in one directory: .*: give one of the files, such as .*later"
        )
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
        assert detect(first) == "mindformers"
        found = inspect(first)
        assert found.ok
        assert {info.file for info in found.tensors.values()} == {first}
        convert(first, tmp_path / f"from-{name}")
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def test_what_a_training_leaves_is_skipped(make):
    state = {
        "adam_m.lm_head.weight": torch.zeros(61, 32),
        "adam_v.model.norm_out.weight": torch.zeros(32),
        "global_step": torch.tensor([3], dtype=torch.int32),
        "learning_rate": torch.tensor(0.1),
        "loss_scale": torch.tensor(1.0),
        "model.layers.0.feed_forward.router.router.topk_bias": torch.zeros(EXPERTS),
        "model.layers.0.feed_forward.router.router.fi_parameter": torch.ones(2, EXPERTS),
        "model.layers.0.attention.infer_attention.paged_attention_mgr.key_cache": torch.ones(2),
    }
    path = make(**state)
    with open_checkpoint(path) as source:
        assert sorted(source.skipped) == sorted(state)
        assert re.search(r"skipped 8 tensors of a run's state, such as ", source.remark())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "model.layers.0.feed_forward.router.router.topk_bias",
            (EXPERTS,),
            r"unsupported tensor: .*topk_bias: up to 1: .*balance_via_topk_bias",
        ),
        (
            "model.layers.0.feed_forward.ffn.w1",
            (EXPERTS, 32, 96),
            r"^experts of .*\(MoEV3\) are not",
        ),
        ("model.layers.0.attention.w_qkv.weight", (64, 32), r"^concatenated projections"),
        (
            "model.layers.0.feed_forward.shared_experts.w1.weight",
            (48, 32),
            "^shared experts are not",
        ),
        ("model.layers.0.attention.wq.bias", (32,), "^biases are not read"),
        ("model.layers.3.attention.wq.weight", (32, 32), r"extra tensor: .*layers\.3"),
        ("exp_something.lm_head.weight", (61, 32), r"extra tensor: .*exp_something"),
    ],
)
def test_what_is_no_part_of_the_model_is_named(make, name, shape, message):
    path = make(**{name: torch.ones(shape)})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)
    assert re.search(message, inspect(path).problem)


def test_gaps_and_other_shapes(make):
    path = make()
    (file,) = path.glob("*.safetensors")
    whole = load_file(file)
    save_file({n: t for n, t in whole.items() if n != W1}, file)
    with pytest.raises(CheckpointError, match=rf"missing tensor: .*{re.escape(W1)}"):
        open_checkpoint(path)
    save_file(whole | {W1: whole[W1][:3].contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"wrong shape: .*w1\.weight: \[3, 48, 32\]"):
        open_checkpoint(path)


def test_a_number_that_float16_does_not_hold(tmp_path, make):
    path = make(dtype=torch.float32)
    (file,) = path.glob("*.safetensors")
    whole = load_file(file)
    whole[W1][2, 3, 4] = 7e4
    save_file(whole, file)
    with pytest.raises(CheckpointError, match=rf"^overflow: .*{re.escape(W1)} .*70000.*float16"):
        convert(path, tmp_path / "half", "mindformers", "fp16", container="ckpt")
    assert not (tmp_path / "half").exists()


def test_options_of_mindformers_alone(tmp_path, make):
    path = make()
    for option in ({"layout": "gmm"}, {"container": "ckpt"}):
        with pytest.raises(CheckpointError, match=rf"^no choice of {next(iter(option))}: "):
            convert(path, tmp_path / "out", "hf", **option)


def test_our_models_in_their_trainer(tmp_path, make, assert_same_bits, foreign):
    """Its files then have our names, with the optimizer's state; the yaml says what they are."""
    hf = foreign.hf(tmp_path / "hf", "mixtral", torch.bfloat16)
    convert(hf, tmp_path / "ours")
    state = foreign.read(tmp_path / "ours")
    path = make()
    (file,) = path.glob("*.safetensors")
    names = ("adam_m.norm.weight", "step_num", "router_report")
    save_file(state | {name: torch.zeros(32) for name in names}, file)
    convert(path, tmp_path / "again")
    assert_same_bits(state, foreign.read(tmp_path / "again"))


class TestConfiguration:
    def test_the_file_beside_the_weights(self, tmp_path, make, foreign):
        path = make()
        (path / "run.yaml").rename(tmp_path / "run.yaml")
        message = "missing configuration: .*copy the yaml file of the run, or the model's config"
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
        foreign.kinds["mixtral"][1].save_pretrained(path)
        assert detect(path) == "mindformers"
        with open_checkpoint(path) as source:
            of_hf = source.config
        (path / "config.json").unlink()
        for name in ("run.yaml", "other.yml"):
            (path / name).write_text((tmp_path / "run.yaml").read_text())
        with pytest.raises(
            CheckpointError, match=r"several configurations: .*other\.yml, run\.yaml"
        ):
            open_checkpoint(path)
        (path / "other.yml").write_text("runner_config: {}")
        with open_checkpoint(path) as source:
            changes = {"pad_token_id": None, "moe": of_hf.moe}  # coefficients of losses differ
            assert source.config.model_copy(update=changes) == of_hf
            assert "use_flash_attention" in source.ignored_keys

    def test_save_pretrained_loses_the_experts(self, make):
        path = make()
        run = yaml.safe_load((path / "run.yaml").read_text())
        del run["moe_config"]
        (path / "run.yaml").write_text(yaml.safe_dump(run))
        message = r"contradiction: .*ffn\.w1\.weight, and a configuration without.*add moe_config"
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)

    def test_a_run_starts_from_it(self, make):
        training = {"seq_length": 8, "global_batch_size": 1, "max_steps": 1}
        for name, format_ in (("w.ckpt", None), ("w.safetensors", "mindformers")):
            path = make(name=name) if format_ is None else make("multi_query", name=name)
            run = path.parent / "run.yaml"
            run.write_text(yaml.safe_dump({"training": training}))
            for start in (path, path / name):
                over = [f"init_from.path={start}"] + [f"init_from.format={format_}"] * bool(format_)
                config = load_run_config(run, over)
                assert config.model.vocab_size == 61
                assert config.init_from.directory == path
