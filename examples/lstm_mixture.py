"""The sparsely-gated layer where its paper has it: between two LSTMs of a language model.

Shazeer et al. 2017 (arXiv:1701.06538, section 5.1 and appendix C): an embedding, an LSTM, experts
behind a noisy Top-K gate, another LSTM, a softmax; each layer is added to its input, and the
experts' result goes through a sigmoid. One line, :func:`~mistral_ms.mixtures.moeify.moeify`, makes
the experts of a feed-forward. Models with more experts, of which each token visits two, are
compared with a feed-forward that is as wide as two experts and so computes as much. The text mixes
eight languages. The last model is trained without the losses that balance the load.

    python -m examples.lstm_mixture --output DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from examples.languages import bayes_loss, language, text
from examples.running import Numbers, Objective, figure, fit, run, save
from mistral_ms.config import RoutingConfig
from mistral_ms.layers import log_softmax
from mistral_ms.mixtures.moeify import moeify, update_gates

V, S, H, WIDTH, TOP_K = 48, 16, 32, 32, 2
LANGUAGES, BATCH = 8, 32
BALANCE = {"importance": 0.1, "load": 0.1}
"""Coefficients of the two losses; the paper's, for a language model."""
MODELS: dict[str, tuple[int, dict[str, float]]] = {
    "no experts, as wide as two": (0, {}),
    "4 experts": (4, BALANCE),
    "16 experts": (16, BALANCE),
    "16 experts, no balancing": (16, {}),
}
"""The number of experts and the losses' coefficients."""


class LanguageModel(nn.Cell):
    """The paper's five layers; what stands between the LSTMs is a feed-forward at first.

    Args:
        width: of the feed-forward's one hidden layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.first = nn.LSTM(H, H, batch_first=True)
        self.ffn = nn.SequentialCell(nn.Dense(H, width, activation="relu"), nn.Dense(width, H))
        self.second = nn.LSTM(H, H, batch_first=True)
        self.head = nn.Dense(H, V)

    def construct(self, ids_BS: Tensor) -> Tensor:
        """Logits [B, S, V] of the next token."""
        x_BSH = self.embedding(ids_BS)
        x_BSH = x_BSH + self.first(x_BSH)[0]
        x_BSH = x_BSH + ops.sigmoid(self.ffn(x_BSH))
        x_BSH = x_BSH + self.second(x_BSH)[0]
        return self.head(x_BSH)


def next_token_loss(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """The mean over all tokens."""
    log_probs_TV = log_softmax(logits_BSV.reshape(-1, V))
    return -ops.gather_elements(log_probs_TV, 1, targets_BS.reshape(-1, 1)).mean()


def build(experts: int, losses: dict[str, float]) -> tuple[LanguageModel, dict[str, Any]]:
    """A model, and its sparse layers by name: one or none. Every expert has twice the slots of an
    even load in training; outside of it nothing is dropped.
    """
    ms.set_seed(1)
    if not experts:
        return LanguageModel(TOP_K * WIDTH), {}
    model = LanguageModel(WIDTH)
    layers = moeify(
        model,
        experts,
        "noisy_top_k",
        top_k=TOP_K,
        init="fresh",
        routing=RoutingConfig(policy="capacity", capacity_factor=2.0),
        eval_routing=RoutingConfig(),
        packed=False,
        losses=losses,
    )
    return model, layers


def train(
    experts: int, losses: dict[str, float], chains: list[np.ndarray], steps: int
) -> tuple[LanguageModel, list[float], np.ndarray]:
    """The model, the loss of each step, and each expert's share of the choices: [steps, E]."""
    model, layers = build(experts, losses)
    each, shares = BATCH // len(chains), []

    def batch(step: int) -> tuple[np.ndarray, ...]:
        ids = np.concatenate([text(c, each, S + 1, [step, n]) for n, c in enumerate(chains)])
        return ids[:, :-1], ids[:, 1:]

    def watch(step: int) -> None:
        for counts_E in update_gates(layers).values():
            shares.append(counts_E / counts_E.sum())

    optimizer = nn.Adam(model.trainable_params(), 5e-3)
    found = fit(Objective(model, next_token_loss), optimizer, batch, steps, watch)
    return model, found, np.array(shares)


def evaluate(model: LanguageModel, ids: np.ndarray) -> float:
    """The mean loss on fresh rows, without noise."""
    model.set_train(False)
    return float(next_token_loss(model(Tensor(ids[:, :-1])), Tensor(ids[:, 1:])).asnumpy())


def main(output: Path, short: bool = False) -> Numbers:
    """Trains every model; draws losses and loads."""
    steps = 2 if short else 400
    chains = [language(V, seed) for seed in range(LANGUAGES)]
    fresh = np.concatenate([text(c, 32, S + 1, [9999, n]) for n, c in enumerate(chains)])
    best = float(np.mean([bayes_loss(chain) for chain in chains]))
    drawn, axes = figure(1, 2, figsize=(11, 4.2), width_ratios=(1.3, 1))
    numbers: Numbers = {"steps": steps, "entropy of the languages": round(best, 3)}
    for name, (experts, losses) in MODELS.items():
        model, found, shares = train(experts, losses, chains, steps)
        fresh_loss = evaluate(model, fresh)
        numbers[name] = {
            "parameters": sum(p.size for p in model.trainable_params()),
            "loss on fresh text": round(fresh_loss, 3),
        }
        smooth = np.convolve(found, np.ones(10) / 10, "valid") if steps >= 10 else found
        (line,) = axes[0].plot(smooth, label=f"{name}: {fresh_loss:.2f} on fresh text")
        if experts:
            late = shares[-max(1, len(shares) // 10) :].mean(0)
            largest = float(late.max() * experts)
            numbers[name]["largest load over the mean"] = round(largest, 2)
            axes[1].plot(
                np.sort(late)[::-1] * experts,
                marker="o",
                color=line.get_color(),
                label=f"{name}: at most {largest:.1f}",
            )
    axes[0].set(xlabel="step", ylabel="loss of the batch", title="Experts between two LSTMs")
    axes[1].axhline(1, color="grey", linestyle=":")
    axes[1].set(
        xlabel="experts, the busiest first", ylabel="load over the mean", title="Who is busy"
    )
    for axis in axes:
        axis.legend(frameon=False)
    return save(drawn, output, "lstm_mixture", numbers)


if __name__ == "__main__":
    run(main, __doc__.partition("\n")[0])
