"""Random routed experts (PanGu-Sigma): four languages, one model, and each language's own model.

Trains a decoder whose two upper layers have one expert group for each language, on all languages at
once; extracts each language's model; scrambles what was not extracted, and compares the outputs bit
by bit. The picture shows each language's loss under the whole model, under its own, and under those
of the others.

    python -m examples.random_routed_experts --output DIR
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops

from examples.languages import bayes_loss, language, text
from examples.running import Numbers, draw_matrix, figure, fit, run, save
from mistral_ms.checkpoint import open_checkpoint, save_native
from mistral_ms.config import ModelConfig, MoEArchitecture
from mistral_ms.layers import token_nll
from mistral_ms.mixtures.domains import TABLE, DomainLM, extract_domain

V, S, DOMAINS, GROUP = 64, 32, 4, 2
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=S,
    initializer_range=0.1,
    torch_dtype="float32",
    moe=MoEArchitecture(
        num_local_experts=DOMAINS * GROUP,
        num_experts_per_tok=1,
        sparse_layers=(2, 3),
        gate={"name": "random_routed", "domains": DOMAINS},  # type: ignore[arg-type]
    ),
)
PLACES = np.arange(S, dtype=np.int32)


class NextToken(nn.Cell):
    """Mean loss of the next token."""

    def __init__(self, model: DomainLM) -> None:
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, ids_BT: Tensor, places_BS: Tensor, domain_B: Tensor) -> Tensor:
        """Rows of S + 1 tokens -> a scalar."""
        logits_BSV = self.model(ids_BT[:, :-1], places_BS, domain_B)
        nll_T, _ = token_nll(logits_BSV.reshape(-1, V), ids_BT[:, 1:].reshape(-1))
        return ops.ReduceMean()(nll_T)


def losses(model: DomainLM, domains: list[int], chains: list[np.ndarray]) -> list[float]:
    """Of each language's fresh text, told to be of ``domains``."""
    found = []
    for number, chain in enumerate(chains):
        ids = text(chain, 32, S + 1, seed=900 + number)
        of = np.full(32, domains[number], np.int32)
        batch = (Tensor(ids), Tensor(np.tile(PLACES, (32, 1))), Tensor(of))
        found.append(float(NextToken(model)(*batch).asnumpy()))
    return found


def opened(path: Path) -> DomainLM:
    """The model of a checkpoint."""
    with open_checkpoint(path) as source:
        model = DomainLM(source.config)
        for name, parameter in model.weights().items():
            parameter.set_data(Tensor(source.read(name)))
    return model


def main(output: Path, short: bool = False) -> Numbers:
    """Trains, extracts, scrambles, compares."""
    steps, batch = (1, 8) if short else (250, 32)
    chains = [language(V, seed) for seed in range(DOMAINS)]
    model = DomainLM(CONFIG)
    model.initialize(0)

    def mixed(step: int) -> tuple[np.ndarray, ...]:
        each = batch // DOMAINS
        ids = [text(chain, each, S + 1, [step, n]) for n, chain in enumerate(chains)]
        domain = np.repeat(np.arange(DOMAINS, dtype=np.int32), each)
        return np.concatenate(ids), np.tile(PLACES, (batch, 1)), domain

    optimizer = nn.Adam(model.trainable_params(), 3e-3)
    curve = fit(NextToken(model), optimizer, mixed, steps)
    numbers: Numbers = {"first loss": round(curve[0], 4), "last loss": round(curve[-1], 4)}
    own, ratios, differences = [], [], []
    with tempfile.TemporaryDirectory() as made:
        values = {name: p.asnumpy().copy() for name, p in model.weights().items()}
        tensors = [(n, v.shape, "float32", v) for n, v in values.items()]
        save_native(Path(made, "whole"), CONFIG, tensors)
        whole = losses(model, list(range(DOMAINS)), chains)
        for domain in range(DOMAINS):
            with open_checkpoint(Path(made, "whole")) as source:
                result = extract_domain(source, Path(made, str(domain)), domain)
            ratios.append(result.ratio)
            extracted = opened(Path(made, str(domain)))
            own.append(losses(extracted, [0] * DOMAINS, chains))
            scramble(model, values, domain)
            batch_of = (Tensor(text(chains[domain], 8, S, 77)), Tensor(np.tile(PLACES, (8, 1))))
            want = model(*batch_of, Tensor(np.full(8, domain, np.int32))).asnumpy()
            found = extracted(*batch_of, Tensor(np.zeros(8, np.int32))).asnumpy()
            differences.append(float(np.abs(want - found).max()))
    numbers["loss of the whole model"] = [round(x, 4) for x in whole]
    numbers["loss of extracted models"] = [[round(x, 4) for x in row] for row in own]
    numbers["best possible loss"] = [round(bayes_loss(chain), 4) for chain in chains]
    numbers["size of an extracted model"] = round(ratios[0], 4)
    numbers["largest difference, others scrambled"] = max(differences)
    drawn, (left, right) = figure(1, 2, figsize=(10, 4))
    left.plot(curve)
    left.axhline(np.mean(numbers["best possible loss"]), color="grey", linestyle=":")
    left.set(xlabel="step", ylabel="loss", title="all languages (dotted: best possible)")
    names = ["whole model", *(f"model {d} ({ratios[d]:.0%})" for d in range(DOMAINS))]
    columns = [str(d) for d in range(DOMAINS)]
    image = draw_matrix(right, np.array([whole, *own]), names, columns, "loss of each language")
    drawn.colorbar(image, ax=right)
    return save(drawn, output, "random_routed_experts", numbers)


def scramble(model: DomainLM, values: dict[str, np.ndarray], domain: int) -> None:
    """Puts noise in the place of every other domain's experts and tables."""
    rng = np.random.default_rng(domain)
    for name, parameter in model.weights().items():
        array = values[name].copy()
        if ".moe.experts." in name:
            mine = slice(domain * GROUP, (domain + 1) * GROUP)
            noise = rng.normal(0, 1, array.shape).astype(np.float32)
            noise[mine] = array[mine]
            array = noise
        elif name.endswith(TABLE):
            array[np.arange(DOMAINS) != domain] = 0
        parameter.set_data(Tensor(array))


if __name__ == "__main__":
    run(main, __doc__.partition("\n")[0])
