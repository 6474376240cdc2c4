"""Adapters on Hugging Face's models in torch, written from the formula; files like PEFT's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from mistral_ms.checkpoint.adapters import open_adapter, write_peft
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.config import DROPLESS, LoraConfig, OptimizerConfig, TrainingConfig
from mistral_ms.config.peft import to_peft
from mistral_ms.datasets import InMemorySequences
from mistral_ms.models import CausalLM
from mistral_ms.training import TrainStep, learning_rate, make_objective
from support.hf import Pair, make_pair

PREFIX = "base_model.model."
MIXTRAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3")
MISTRAL = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TINY = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4,
)  # fmt: skip
STEPS = 20


def tiny_pair(kind: str, **sizes) -> Pair:
    """One decoder block of Mixtral or Mistral."""
    if kind == "mixtral":
        return make_pair(
            "mixtral", **{**TINY, "num_local_experts": 4, "router_aux_loss_coef": 0.02, **sizes}
        )
    return make_pair("kv-heads-equal-heads", **{**TINY, "num_key_value_heads": 4, **sizes})


class Adapted(nn.Module):
    """A linear map whose matrix is W + s B A, or m / |W + s B A| times that, row by row.

    The sum is formed, where ours multiplies by its parts.
    """

    def __init__(self, linear: nn.Linear, lora: LoraConfig, random: np.random.Generator) -> None:
        super().__init__()
        self.linear, self.scaling = linear, lora.scaling
        O, I = linear.weight.shape  # noqa: E741

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.tensor(random.standard_normal(shape) * 0.2).float())

        self.A, self.B = drawn(lora.r, I), drawn(O, lora.r)
        self.m = None
        if lora.use_dora:
            near_one = 1 + 0.1 * random.standard_normal(O)
            lengths = linear.weight.detach().norm(dim=1)
            self.m = nn.Parameter(lengths * torch.tensor(near_one).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.linear.weight + self.scaling * self.B @ self.A
        if self.m is not None:
            weight = (self.m / weight.norm(dim=1).detach())[:, None] * weight
        return x @ weight.T


def insert(model: nn.Module, lora: LoraConfig, seed: int = 0) -> dict[str, Adapted]:
    """Puts adapters beside all matrices that are meant, by endings of names; freezes the rest."""
    random = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.requires_grad = False
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in lora.target_modules
    ]
    found = {}
    for name in names:
        path, _, last = name.rpartition(".")
        found[name] = Adapted(model.get_submodule(name), lora, random)
        setattr(model.get_submodule(path), last, found[name])
    return found


def as_file(adapted: dict[str, Adapted]) -> dict[str, np.ndarray]:
    """The tensors under PEFT's names."""
    tensors = {}
    for name, each in adapted.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = each.A.detach().numpy().copy()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = each.B.detach().numpy().copy()
        if each.m is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = each.m.detach().numpy().copy()
    return tensors


def save(path: Path, lora: LoraConfig, tensors: dict[str, np.ndarray], **more) -> Path:
    """A directory of PEFT's."""
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(to_peft(lora) | more))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def adapted_model(pair: Pair, path: Path, routing=DROPLESS, **options) -> CausalLM:
    """Our model of the pair's weights, with an adapter of PEFT's files."""
    with open_adapter(path, pair.config) as source:
        model = CausalLM(source.config, routing, **options)
        held = model.weights()
        from mindspore import Tensor

        for name, values in pair.weights().items():
            held[name].set_data(Tensor(np.ascontiguousarray(values)))
        load_weights(source, model.stored_weights())
    model.set_train(False)
    return model


def training_config(**more) -> TrainingConfig:
    """Twenty steps of AdamW. The large eps keeps gradients that are all rounding from being steps
    of full size."""
    return TrainingConfig(
        max_steps=STEPS, seq_length=12, global_batch_size=4, router_aux_loss_coef=0.02,
        max_grad_norm=0.5, warmup_steps=2,
        optimizer=OptimizerConfig(
            learning_rate=5e-3, adam_beta2=0.999, adam_epsilon=1e-4, weight_decay=0.0
        ),
        **more,
    )  # fmt: skip


def sequences(config: TrainingConfig, vocab_size: int = 64) -> InMemorySequences:
    """Random tokens."""
    text = np.random.default_rng(1).integers(3, vocab_size, 12 * 8 + 1).tolist()
    return InMemorySequences(text, config.seq_length, config.global_batch_size, config.seed)


def our_training(model: CausalLM, config: TrainingConfig, **context) -> list:
    """The results of all steps."""
    data = sequences(config, model.config.vocab_size)
    update = TrainStep(make_objective(model, config, **context), config, **context)
    return [update(data.batch(step)) for step in range(config.max_steps)]


def torch_training(model, config: TrainingConfig) -> Iterator[tuple[float, float]]:
    """Loss and gradient norm of each step by torch, of a model with adapters."""
    trained = [p for p in model.parameters() if p.requires_grad]
    chosen = config.optimizer
    adamw = torch.optim.AdamW(
        trained, betas=(0.9, 0.999), eps=1e-4, weight_decay=chosen.weight_decay
    )
    data = sequences(config)
    for step in range(config.max_steps):
        batch = data.batch(step)
        labels = torch.tensor(batch.labels_BS).long()
        output = model(torch.tensor(batch.ids_BS).long(), labels=labels, shift_labels=labels)
        adamw.zero_grad()
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item()
        for group in adamw.param_groups:
            group["lr"] = learning_rate(config, step)
        adamw.step()
        yield output.loss.item(), norm


def as_peft(model: CausalLM, path: Path) -> dict[str, np.ndarray]:
    """What a model's adapters are in PEFT's file, by way of a checkpoint of ours."""
    from mistral_ms.checkpoint.save import save_model

    save_model(path / "ours", model.config, model.stored_weights())
    base = model.config.model_copy(update={"lora": None})
    with open_adapter(path / "ours", base) as source:
        write_peft(source, path / "peft", None)
    return load_file(path / "peft" / "adapter_model.safetensors")
