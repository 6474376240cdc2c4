"""Tiny Hugging Face models: the oracle. The key mapping is written apart from the package's.

Of transformers 4, whose Mixtral has a module for each expert, and of 5, which stacks their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.models.mistral.modeling_mistral import MistralMLP

from mistral_ms.config import ModelConfig, from_hf
from mistral_ms.tokenizer import copy_files, packaged_tokenizer

torch.set_num_threads(2)

STACKED = int(transformers.__version__.split(".")[0]) >= 5
"""The weights of experts are parameters [E, ...] of transformers 5."""
SPARSE = "mlp" if STACKED else "block_sparse_moe"
"""What a decoder layer calls its sparse layer."""

BASE = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    attn_implementation="eager",
)
MIXTRAL = dict(num_local_experts=8, num_experts_per_tok=2, output_router_logits=True)
KINDS = {
    "mixtral": ("mixtral", {}),
    "mistral-sliding-window": ("mistral", dict(sliding_window=7)),
    "explicit-head-dim": ("mixtral", dict(head_dim=24)),
    "tied-head": ("mixtral", dict(tie_word_embeddings=True)),
    "kv-heads-equal-heads": ("mistral", dict(num_key_value_heads=8, sliding_window=None)),
    "one-kv-head": ("mixtral", dict(num_key_value_heads=1)),
    "vocab-32768": ("mixtral", dict(vocab_size=32768)),
    "mixtral-sliding-window": ("mixtral", dict(sliding_window=5)),
    "alternating-windows": (
        "ministral",
        dict(sliding_window=4, head_dim=8, layer_types=["full_attention", "sliding_attention"]),
    ),
}
# long contexts; positions reach beyond those that the model had first
SCALED = {
    "linear": ("mixtral", dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
    "dynamic": (
        "mistral",
        dict(
            head_dim=8,
            max_position_embeddings=8,
            rope_scaling=dict(rope_type="dynamic", factor=4.0),
        ),
    ),
    "yarn": (
        "mixtral",
        dict(
            rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
            head_dim=16,
        ),
    ),
    "llama3": (
        "ministral",
        dict(
            head_dim=8,
            sliding_window=4,
            layer_types=["full_attention", "sliding_attention"],
            rope_scaling=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
    ),
}
CLASSES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, MIXTRAL),
    "mistral": (MistralForCausalLM, MistralConfig, {}),
    "ministral": (MinistralForCausalLM, MinistralConfig, {}),
}


@dataclass(frozen=True)
class Pair:
    """A Hugging Face model and our configuration of the same architecture."""

    hf: torch.nn.Module
    config: ModelConfig

    def weights(self) -> dict[str, np.ndarray]:
        return our_weights(dict(self.hf.named_parameters()), self.config)

    def gradients(self) -> dict[str, np.ndarray]:
        grads = {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in self.hf.named_parameters()
        }
        return our_weights(grads, self.config)


def make_pair(kind: str, seed: int = 0, **overrides) -> Pair:
    family, special = (KINDS | SCALED)[kind]
    torch.manual_seed(seed)
    model, config, sizes = CLASSES[family]
    hf = model(config(**{**BASE, **sizes, **special, **overrides})).float().eval()
    with torch.no_grad():  # norms that are not all ones
        for name, parameter in hf.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    config, _ = from_hf(hf.config.to_dict())
    return Pair(hf, config)


def save_with_tokenizer(path: Path) -> Pair:
    """A small Mixtral whose directory has everything that a command asks for."""
    pair = make_pair("mixtral", vocab_size=32000, hidden_size=32)
    pair.hf.save_pretrained(path)
    copy_files(packaged_tokenizer(), path)
    return pair


def save_one_layer(path: Path) -> Path:
    """A Mixtral of one layer with the packaged tokenizer and its vocabulary, in a directory."""
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_local_experts=4)
    make_pair("mixtral", vocab_size=32000, **sizes).hf.save_pretrained(path)
    copy_files(packaged_tokenizer(), path)
    return path


def hf_greedy(pair: Pair, prompt: list[int], new: int) -> list[int]:
    """The new tokens that transformers chooses."""
    pair.hf.config.output_router_logits = False  # transformers' aux loss fails with a cache
    out = pair.hf.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def hf_logits(pair: Pair, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Logits [B, S, V] of right-padded rows (position -1 = padding)."""
    with torch.no_grad():
        mask = torch.tensor(positions >= 0).long()
        return pair.hf(torch.tensor(ids).long(), attention_mask=mask).logits.numpy()


class DenseBlock(MistralMLP):
    """A dense feed-forward where Mixtral's decoder layer expects a sparse block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, None]:
        y = super().forward(x)
        return y if STACKED else (y, None)


def make_mixed_pair(layers: int, sparse_layers: tuple[int, ...], seed: int = 0) -> Pair:
    """A Mixtral with dense feed-forwards in all layers but ``sparse_layers``."""
    pair = make_pair("mixtral", seed, num_hidden_layers=layers)
    for i, layer in enumerate(pair.hf.model.layers):
        if i not in sparse_layers:
            block = DenseBlock(pair.hf.config)
            setattr(layer, SPARSE, block)
            for parameter in block.parameters():
                torch.nn.init.normal_(parameter, std=BASE["initializer_range"])
    moe = pair.config.moe.model_copy(update={"sparse_layers": sparse_layers})
    return Pair(pair.hf, pair.config.model_copy(update={"moe": moe}))


def our_weights(hf: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, np.ndarray]:
    """Hugging Face's tensors under our names, experts stacked."""

    def take(name: str) -> np.ndarray:
        return hf[name + ".weight"].detach().float().numpy()

    ours = {
        "embed_tokens.weight": take("model.embed_tokens"),
        "norm.weight": take("model.norm"),
    }
    if not config.tie_word_embeddings:
        ours["lm_head.weight"] = take("lm_head")
    for i in range(config.num_hidden_layers):
        theirs, mine = f"model.layers.{i}.", f"layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            ours[f"{mine}{norm}.weight"] = take(theirs + norm)
        for x in "qkvo":
            ours[f"{mine}attention.{x}_proj.weight"] = take(f"{theirs}self_attn.{x}_proj")
        if not config.is_sparse(i):
            dense = theirs + ("mlp." if config.moe is None else f"{SPARSE}.")
            for w, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                ours[f"{mine}feed_forward.{w}.weight"] = take(dense + name)
        else:
            block = f"{theirs}{SPARSE}."
            ours[f"{mine}moe.router.weight"] = take(block + "gate")
            for w, values in expert_weights(hf, f"{block}experts").items():
                ours[f"{mine}moe.experts.{w}"] = values.detach().float().numpy()
    return ours


def hf_experts(experts: str, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The way back, from w1, w2 and w3."""
    if STACKED:
        gate_up = np.concatenate([weights["w1"], weights["w3"]], 1)
        return {f"{experts}.gate_up_proj": gate_up, f"{experts}.down_proj": weights["w2"]}
    return {
        f"{experts}.{e}.{w}.weight": matrix
        for w, matrices in weights.items()
        for e, matrix in enumerate(matrices)
    }


def expert_weights(hf: dict[str, torch.Tensor], experts: str) -> dict[str, torch.Tensor]:
    """Those of the experts of a layer, stacked: w1 and w3 [E, I, H], w2 [E, H, I]."""
    if STACKED:
        w1, w3 = hf[f"{experts}.gate_up_proj"].chunk(2, dim=1)
        return {"w1": w1, "w2": hf[f"{experts}.down_proj"], "w3": w3}
    number = sum(name.startswith(f"{experts}.") and name.endswith(".w1.weight") for name in hf)
    return {
        w: torch.stack([hf[f"{experts}.{e}.{w}.weight"] for e in range(number)])
        for w in ("w1", "w2", "w3")
    }
