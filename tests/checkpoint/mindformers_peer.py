"""MindFormers' own Mixtral of 1.x, run in a process of its own: ``python mindformers_peer.py DIR``.

Its ``LlamaForCausalLM`` with ``MoEV2`` draws weights and saves them in its ways; ours converts them
and back. What is left in DIR is for the tests in ``test_mindformers_peer.py``.
"""

import json
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindformers import AutoModelForCausalLM
from mindformers.models.llama import LlamaConfig, LlamaForCausalLM
from mindspore import nn
from support.mindformers_cpu import run_on_cpu

from mistral_ms.checkpoint import convert

SIZES = {
    "batch_size": 2,
    "seq_length": 16,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 64,
    "intermediate_size": 48,
    "theta": 1e6,
    "rms_norm_eps": 1e-5,
    "pad_token_id": -1,
    "init_method_std": 0.2,
    "use_flash_attention": False,
    "fused_rms_norm": False,
    "compute_dtype": "float32",
    "rotary_dtype": "float32",
    "softmax_compute_type": "float32",
    "param_init_type": "float32",
}
MOE = {
    "expert_num": 4,
    "num_experts_chosen": 2,
    "routing_policy": "TopkRouterV2",
    "aux_loss_factor": 0.05,
}
POLICIES = {
    "dropless": {"capacity_factor": -1.0},
    "token_major": {"capacity_factor": 1.1, "enable_sdrop": True},
    "choice_major": {"capacity_factor": 1.1, "enable_sdrop": False},
}


def build(policy, **options):
    config = LlamaConfig(**SIZES, moe_config={**MOE, **POLICIES[policy]}, **options)
    return LlamaForCausalLM(config)


def shapes(model):
    return {p.name: [list(p.shape), str(p.dtype)] for p in model.get_parameters()}


def logits(model, ids):
    model.set_train(False)
    return model(ms.Tensor(ids))[0].asnumpy().reshape(*ids.shape, SIZES["vocab_size"])


def load(model, file):
    """Their way to load a file; what it left out is returned."""
    container = file.suffix[1:]
    parameters = ms.load_checkpoint(str(file), format=container)
    missing, _ = ms.load_param_into_net(model, parameters, strict_load=True)
    return [*missing, *(set(parameters) - {p.name for p in model.get_parameters()})]


def main(directory):
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
    ms.set_seed(1)
    ids = np.random.default_rng(0).integers(3, 64, (2, 16)).astype(np.int32)
    model = run_on_cpu(build("dropless"))
    model.save_pretrained(str(directory / "pretrained"))
    with (directory / "pretrained" / "mindspore_model.yaml").open("a") as file:
        file.write(f"moe_config: {json.dumps(MOE)}\n")  # which save_pretrained leaves out
    arrays = {"ids": ids, "dropless": logits(model, ids)}
    found = {"fused": shapes(model)}

    theirs = directory / "trained"  # as CheckpointMonitor leaves it: state and counters inside
    theirs.mkdir()
    optimizer = nn.Adam(model.trainable_params(), 1e-3)
    extra = {"epoch_num": 1, "step_num": 3, "loss_scale": 65535.0, "global_batch_size": 2}
    saved = [
        {"name": p.name, "data": p} for p in {*model.get_parameters(), *optimizer.get_parameters()}
    ]
    for format_, crc in (("safetensors", False), ("ckpt", True)):
        name = f"mixtral_rank_0-1_3.{format_}"
        ms.save_checkpoint(
            saved, str(theirs / name), append_dict=extra, format=format_, crc_check=crc
        )

    for layout in ("fused", "gmm"):
        convert(directory / "pretrained", directory / f"{layout}", "mindformers", layout=layout)
    convert(directory / "pretrained", directory / "ours")
    convert(directory / "ours", directory / "back", "mindformers", container="ckpt")
    for file in ("fused/mindspore_model.safetensors", "back/mindspore_model.ckpt"):
        again = run_on_cpu(build("dropless"))
        found[f"left out of {file}"] = load(again, directory / file)
        arrays[file] = logits(again, ids)
    on_cpu = {name: SIZES[name] for name in ("batch_size", "use_flash_attention", "fused_rms_norm")}
    again = AutoModelForCausalLM.from_pretrained(str(directory / "back"), **on_cpu)
    arrays["from_pretrained"] = logits(run_on_cpu(again), ids)
    for policy in ("token_major", "choice_major"):
        again = run_on_cpu(build(policy))
        load(again, directory / "back" / "mindspore_model.ckpt")
        arrays[policy] = logits(again, ids)
    cached = build("dropless", use_past=True)
    found["gmm"] = shapes(cached)
    found["left out of gmm"] = load(cached, directory / "gmm" / "mindspore_model.safetensors")
    np.savez(directory / "arrays.npz", **arrays)
    (directory / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
