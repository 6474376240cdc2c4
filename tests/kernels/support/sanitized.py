"""Runs every operator under AddressSanitizer; ``twin/test_sanitizers.py`` starts it as a process.

usage: sanitized.py LIBRARY RESULTS        all operators; outputs go to RESULTS (npz)
       sanitized.py LIBRARY --kernel NAME  one kernel over two buffers of 64 floats
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from kernels.support.twin import Twin, to_bf16

ALL = ("float32", "float16", "bfloat16")
AWKWARD = [  # T, E, K, C, H; the small ones reach all the code of every type
    (1, 1, 1, 1, 1, ALL),
    (7, 3, 2, 2, 33, ALL),
    (65, 8, 2, 18, 100, ALL),
    (130, 60, 4, 5, 257, ("bfloat16",)),
    (20, 256, 8, 3, 16, ("float16",)),
]


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """As an array of a type that the operators take."""
    return to_bf16(values) if dtype == "bfloat16" else values.astype(dtype)


def all_outputs(twin: Twin) -> dict[str, np.ndarray]:
    """Outputs of all operators over awkward sizes, data types, and numbers of blocks."""
    results = {}
    for case, (T, E, K, C, H, dtypes) in enumerate(AWKWARD):
        rng = np.random.default_rng(case)
        for dtype in dtypes:
            blocks = (1, 3, 40)[(case + len(dtype)) % 3]

            def run(name, inputs, label=f"{case}-{dtype}", blocks=blocks, **attrs):
                made = twin.run(name, inputs, attrs, blocks=blocks).outputs
                results.update({f"{label}-{name}-{key}": value for key, value in made.items()})
                return made

            x, finished = cast(rng.normal(size=(T, E)), dtype), rng.random(T) < 0.2
            gate = run("moe_gating_top_k", {"x": x, "finished": finished}, k=K, renorm=1)
            chosen = gate["expert_idx"]
            probs = rng.normal(size=(T, E)).astype(np.float32)
            inputs = {"x": x, "expert_idx": chosen, "dy": gate["y"], "d_softmax_out": probs}
            run("moe_gating_top_k_grad", inputs, k=K, renorm=1)
            groups = next(g for g in (4, 3, 2, 1) if (E % g == 0 and E // g >= 2) or g == 1)
            rules = dict(norm_type=1, group_count=groups, k_group=groups, group_select_mode=1)
            rules = rules if E > 1 else dict(norm_type=1)
            biased = {"x": x, "bias": probs[0], "finished": finished}
            run("moe_gating_top_k", biased, f"{case}-{dtype}-biased", k=K, out_flag=0, **rules)
            table = run(
                "moe_expert_capacity", {"expert_idx": chosen},
                expert_num=E, expert_capacity=C, drop_priority=case % 2,
            )  # fmt: skip
            rows, source = table["expanded_row_idx"], table["slot_src"]
            tokens = cast(rng.normal(size=(T, H)), dtype)
            for given in ({}, {"x": tokens}):
                label = f"{case}-{dtype}-{len(given)}"
                run("moe_permute", {"expert_idx": chosen, **given}, label, expert_num=E)
            packed = {n: cast(rng.normal(size=(T, H)), dtype) for n in ("gate", "up")}
            packed["expert_tokens_cumsum"] = np.full(E, T - T // 3, np.int32)
            run("moe_swiglu", packed)
            run("moe_swiglu_grad", {"dy": tokens, **packed})
            for inverse in (None, rows):
                given = {"x": tokens, "slot_src": source, "expanded_row_idx": inverse}
                moved = run("moe_dispatch", given, expert_num=E, expert_capacity=C, k=K)
            expanded = moved["expanded_x"]
            run("moe_dispatch_grad", {"d_expanded_x": expanded, "expanded_row_idx": rows}, k=K)
            combine = {"expanded_x": expanded, "expanded_row_idx": rows, "scales": gate["y"]}
            run("moe_combine", combine)
            run("moe_combine_grad", {**combine, "dy": tokens, "slot_src": source})
    return results


def main(library: str, *rest: str) -> None:
    twin = Twin(Path(library))
    if rest[0] == "--kernel":
        buffers = [("i", np.zeros(64, np.float32)), ("o", np.zeros(64, np.float32))]
        twin.launch(rest[1], buffers, tiling=bytes(4))
    else:
        np.savez(rest[0], **all_outputs(twin))


if __name__ == "__main__":
    main(*sys.argv[1:])
