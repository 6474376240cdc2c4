"""Foreign checkpoints to read, made by Hugging Face's own code or by an oracle of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from support.hf import STACKED, expert_weights
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from mistral_ms.checkpoint import our_shapes, save_native
from mistral_ms.config import ModelConfig, MoEArchitecture

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(**COMMON, **MOE)),
    "mistral": (MistralForCausalLM, MistralConfig(**COMMON, sliding_window=8)),
    "head_dim": (MistralForCausalLM, MistralConfig(**COMMON, head_dim=24, sliding_window=None)),
    "tied": (MistralForCausalLM, MistralConfig(**COMMON, tie_word_embeddings=True)),
    "multi_query": (
        MixtralForCausalLM,
        MixtralConfig(**(COMMON | MOE | {"num_key_value_heads": 1})),
    ),
}


def _model(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    cls, config = KINDS[kind]
    torch.manual_seed(sorted(KINDS).index(kind))
    return cls(config).to(dtype)


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By the names of transformers 4: version 5 stacks experts in memory."""
    state = model.state_dict()
    if not STACKED:
        return state
    found = {n: t for n, t in state.items() if ".experts." not in n}
    for layer in range(model.config.num_hidden_layers):
        experts = f"model.layers.{layer}.mlp.experts"
        if f"{experts}.down_proj" in state:
            for w, matrices in expert_weights(state, experts).items():
                found |= {f"{experts}.{e}.{w}.weight": each for e, each in enumerate(matrices)}
    sparse = isinstance(model, MixtralForCausalLM)
    return {n.replace(".mlp.", ".block_sparse_moe.") if sparse else n: found[n] for n in found}


def _save_hf(path: Path, kind: str, dtype: torch.dtype = torch.float32, **options) -> Path:
    _model(kind, dtype).save_pretrained(path, **options)
    return path


def _save_bin(path: Path, kind: str, shards: int = 1, legacy: bool = False) -> Path:
    """pytorch_model.bin as transformers wrote it before safetensors, with its index."""
    model = _model(kind, torch.bfloat16)
    model.config.save_pretrained(path)
    state = list(_state(model).items())
    zipped = {"_use_new_zipfile_serialization": not legacy}
    if shards == 1:
        torch.save(dict(state), path / "pytorch_model.bin", **zipped)
        return path
    weight_map = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = dict(state[i::shards])
        torch.save(part, path / name, **zipped)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, read by the safetensors library."""
    state = {}
    for file in sorted(path.glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                assert name not in state
                state[name] = handle.get_tensor(name)
    return state


def _pairs_from_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: Mistral's row 2i of a head is HF's row i, its row 2i + 1 is HF's row D/2 + i."""
    dim = weight.shape[0] // heads
    rows = []
    for head in range(heads):
        for i in range(dim // 2):
            rows += [head * dim + i, head * dim + dim // 2 + i]
    return weight[rows].contiguous()


_TO_MISTRAL = {
    "model.embed_tokens.": "tok_embeddings.",
    "model.norm.": "norm.",
    "lm_head.": "output.",
    "model.layers.": "layers.",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "block_sparse_moe.": "feed_forward.",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def _mistral_state(state: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for theirs, mistral in _TO_MISTRAL.items():
            name = name.replace(theirs, mistral)
        if ".wq." in name:
            tensor = _pairs_from_halves(tensor, config.num_attention_heads)
        if ".wk." in name:
            tensor = _pairs_from_halves(tensor, config.num_key_value_heads)
        renamed[name] = tensor
    return renamed


def _params(config) -> dict[str, object]:
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim or config.hidden_size // config.num_attention_heads,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"] if STACKED else config.rope_theta,
    }
    if config.sliding_window is not None:
        params["sliding_window"] = config.sliding_window
    if hasattr(config, "num_local_experts"):
        params["moe"] = {
            "num_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
        }
    return params


def _save_mistral(path: Path, kind: str, dtype=torch.bfloat16, pickle: bool = False) -> Path:
    path.mkdir()
    model = _model(kind, dtype)
    state = _mistral_state(_state(model), model.config)
    if pickle:
        torch.save(state, path / "consolidated.00.pth")
    else:
        save_file({n: t.contiguous() for n, t in state.items()}, path / "consolidated.safetensors")
    (path / "params.json").write_text(json.dumps(_params(model.config)))
    return path


def _dump_state(state: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """Experts stacked along the rows, w2 transposed: what transformers' script takes apart."""
    dump = {n: t for n, t in _mistral_state(state, config).items() if "feed_forward" not in n}
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}.block_sparse_moe", f"layers.{layer}.block_sparse_moe"
        dump[f"{ours}.gate.weight"] = state[f"{theirs}.gate.weight"]
        for w in ("w1", "w2", "w3"):
            experts = [state[f"{theirs}.experts.{e}.{w}.weight"] for e in range(4)]
            dump[f"{ours}.{w}"] = torch.cat([e.T if w == "w2" else e for e in experts], dim=0)
    return dump


def _save_dump(path: Path, kind: str = "mixtral", hf_params: bool = False) -> Path:
    """One file per layer here; the published dump has eight files of four layers each."""
    path.mkdir()
    model = _model(kind, torch.bfloat16)
    state = _dump_state(_state(model), model.config)
    last = model.config.num_hidden_layers - 1
    for layer in range(model.config.num_hidden_layers):
        outer = {"tok_embeddings.weight"} if layer == 0 else set()
        outer |= {"norm.weight", "output.weight"} if layer == last else set()
        part = {n: t for n, t in state.items() if n in outer or n.startswith(f"layers.{layer}.")}
        torch.save(part, path / f"consolidated.{layer:02d}.pt")
    params = model.config.to_dict() if hf_params else _params(model.config)
    params.pop("model_type", None)
    (path / "params.json").write_text(json.dumps(params))
    return path


def _save_fused(path: Path) -> Path:
    """The tensors as the classes of transformers 5 hold them."""
    path.mkdir()
    model = _model("mixtral", torch.bfloat16)
    model.config.save_pretrained(path)
    state = _state(model)
    fused = {n: t for n, t in state.items() if "block_sparse_moe" not in n}
    for layer in range(model.config.num_hidden_layers):
        old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        fused[f"{new}.gate.weight"] = state[f"{old}.gate.weight"]
        w1, w2, w3 = (
            torch.stack([state[f"{old}.experts.{e}.{w}.weight"] for e in range(4)])
            for w in ("w1", "w2", "w3")
        )
        fused[f"{new}.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        fused[f"{new}.experts.down_proj"] = w2
    save_file(fused, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def foreign() -> SimpleNamespace:
    """Makers of foreign checkpoints; each takes a path that does not exist (hf, bin: may)."""
    return SimpleNamespace(
        model=_model,
        hf=_save_hf,
        bin=_save_bin,
        mistral=_save_mistral,
        dump=_save_dump,
        fused=_save_fused,
        read=_read_safetensors,
        pairs_from_halves=_pairs_from_halves,
        kinds=KINDS,
    )


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[[dict, dict], None]:
    """Asserts that two state dicts have the same names, dtypes, shapes and bits."""

    def check(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
        assert sorted(one) == sorted(two)
        for name, left in one.items():
            right = two[name]
            assert (left.dtype, left.shape) == (right.dtype, right.shape), name
            bits = {4: torch.int32, 2: torch.int16}[left.element_size()]
            equal = np.array_equal(left.view(bits).numpy(), right.view(bits).numpy())
            assert equal, f"{name} differs"

    return check


@pytest.fixture
def tiny_config() -> ModelConfig:
    """Three layers, three experts, odd sizes."""
    return ModelConfig(
        vocab_size=13,
        hidden_size=12,
        intermediate_size=10,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=4,
        torch_dtype="float32",
        moe=MoEArchitecture(num_local_experts=3),
    )


@pytest.fixture
def save_random() -> Callable[..., dict[str, np.ndarray]]:
    """Saves random float32 weights as a checkpoint of ours; returns them."""

    def save(path: Path, config: ModelConfig, **options) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        shapes = our_shapes(config)
        arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
        save_native(
            path, config, [(n, a.shape, "float32", a) for n, a in arrays.items()], **options
        )
        return arrays

    return save
