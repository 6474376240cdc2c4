"""A gate of one's own: choices by the angle between token and expert, in thirty lines.

The class below is all that is needed: the run files, checkpoints, metrics and optimizers know the
gate by its name from then on. The example trains a small decoder with it and with Mixtral's gate;
the picture shows the losses and how even the loads are.

    python -m examples.own_gate --output DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
from mindspore import ops
from pydantic import Field

from examples.decoders import loss
from examples.gates import EXPERTS, LANGUAGES, S, V, train, variation
from examples.languages import language, text
from examples.running import Numbers, figure, run, save
from mistral_ms.config import GateSettings
from mistral_ms.moe import Gate, register_gate


# ---- the gate -----------------------------------------------------------------------------------
class CosineTopKSettings(GateSettings):
    """``moe.gate: {name: cosine_top_k, temperature: 0.1}``."""

    name: str = "cosine_top_k"
    temperature: float = Field(default=0.1, gt=0)


@register_gate(CosineTopKSettings)
class CosineTopK(Gate):
    """Softmax of cosines over a temperature, Top-K, renormalised: no expert is loud by its norm."""

    def route(self, x_TH: Any, weights: Any, state: Any, context: Any) -> Any:
        """Weights, experts, scores that add up to 1, logits, and terms of further losses."""
        (weight_EH,) = weights
        cosines_TE = self.logits(unit(x_TH), unit(weight_EH))
        logits_TE = cosines_TE / cast(CosineTopKSettings, self.moe.gate).temperature
        scores_TE = ops.softmax(logits_TE, -1)
        best_TK, experts_TK = ops.topk(scores_TE, self.top_k)
        weights_TK = best_TK / best_TK.sum(-1, keepdims=True)
        return weights_TK, experts_TK.astype("int32"), scores_TE, logits_TE, ()


def unit(x: Any) -> Any:
    """Rows of length 1."""
    return x / ops.sqrt((x * x).sum(-1, keepdims=True) + 1e-12)


# -------------------------------------------------------------------------------------------------

GATES = {"Mixtral's": "softmax_top_k", "by angle": {"name": "cosine_top_k", "temperature": 0.1}}


def main(output: Path, short: bool = False) -> Numbers:
    """Trains with both; neither has a loss that balances the load."""
    steps = 2 if short else 120
    chains = [language(V, seed) for seed in range(LANGUAGES)]
    fresh = np.concatenate([text(c, 16, S + 1, [99, n]) for n, c in enumerate(chains)])
    drawn, (left, right) = figure(1, 2, figsize=(10, 4))
    numbers: Numbers = {"steps": steps}
    for name, gate in GATES.items():
        moe = {"num_experts_per_tok": 2, "gate": gate}
        model, losses, shares = train(moe, 0.0, chains, steps)
        found = {"loss on fresh text": loss(model, fresh), "variation of load": variation(shares)}
        numbers[name] = {key: round(value, 3) for key, value in found.items()}
        left.plot(losses, label=f"{name}: {found['loss on fresh text']:.2f} on fresh text")
        loads_LE = shares[-max(1, steps // 10) :].mean(0).reshape(2, EXPERTS)
        loads = np.sort(loads_LE)[:, ::-1].mean(0)
        right.plot(range(1, EXPERTS + 1), 100 * loads, marker="o", label=name)
    left.set(xlabel="step", ylabel="loss of the batch", title="No loss balances the load")
    right.axhline(100 / EXPERTS, color="grey", linestyle=":", label="balanced")
    right.set(xlabel="expert, the busiest first", ylabel="share of choices, %", ylim=(0, None))
    right.set_title("Mean of both layers, last tenth of the steps")
    left.legend(frameon=False)
    right.legend(frameon=False)
    return save(drawn, output, "own_gate", numbers)


if __name__ == "__main__":
    run(main, __doc__.partition("\n")[0])
