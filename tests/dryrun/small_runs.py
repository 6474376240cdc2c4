"""Small runs for the auto-parallel graph: float16, a row per rank and dispatch group.

Not a test. The sizes are names, so that tests can say what bytes are made of.
"""

from __future__ import annotations

from collections.abc import Mapping

from mistral_ms.config import RunConfig

H, WIDE, V, S = 64, 96, 160, 24
E, K = 8, 2
C = 7  # ceil(1.1 * K * S / E)
QUERIES, KEYS = H, H // 2  # four heads of 16, two of keys
HALF, FLOAT = 2, 4


def layers_of(parallel: Mapping[str, object]) -> int:
    """One for each stage; two where matrices are divided or dispatch groups overlap, to tell what
    is said for each layer from what is said once. More would be compiled for longer, and say the
    same once more.
    """
    several = parallel.get("mp", 1) > 1 or parallel.get("micro_batch_interleave_num", 1) > 1
    return 2 if several else parallel.get("pp", 1)


def small_run(
    parallel: dict[str, object],
    micro: int = 1,
    moe: bool = True,
    policy: str = "capacity",
    aux_loss: str = "per_layer",
    tied: bool = False,
    **training: object,
) -> dict[str, object]:
    """As a run file has it."""
    model = {
        "vocab_size": V,
        "hidden_size": H,
        "intermediate_size": WIDE,
        "num_hidden_layers": layers_of(parallel),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
    }
    if model["num_hidden_layers"] == 2:  # which changes no message
        model |= {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_scaling": {
                "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16
            },
        }  # fmt: skip
    if moe:
        model["moe"] = {"num_local_experts": E}
    return {
        "model": model,
        "routing": {"policy": policy, "aux_loss": aux_loss},
        "training": {
            "max_steps": 1,
            "seq_length": S,
            "global_batch_size": parallel["dp"]
            * micro
            * parallel.get("micro_batch_interleave_num", 1),
            "gradient_accumulation_steps": micro,
            "dtype": "float16",
            "router_aux_loss_coef": 0.01,
            **training,
        },
        "parallel": parallel,
    }


def explicit(run: dict[str, object]) -> RunConfig:
    """The same run for the explicit path, whose stages go forward again whatever it says."""
    parallel = {**run["parallel"], "recompute": "none"}
    return RunConfig.model_validate({**run, "parallel": parallel})
