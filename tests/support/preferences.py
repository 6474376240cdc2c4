"""Pairs of random answers, and torch's side of learning from them."""

from __future__ import annotations

import numpy as np
import torch

from mistral_ms.config import DpoConfig
from mistral_ms.datasets import Batch
from mistral_ms.datasets.preferences import PreferenceSequences


def random_pairs(pairs: int, seq_length: int, batch_size: int, vocab: int = 48, seed: int = 3):
    """Prompts of two tokens or three with answers of several lengths, padded on the right."""
    random = np.random.default_rng(seed)
    shape = pairs, 2, seq_length
    ids = random.integers(3, vocab, shape).astype(np.int32)
    labels, positions = np.full(shape, -100, np.int32), np.full(shape, -1, np.int32)
    for pair in range(pairs):
        prompt = 2 + pair % 2
        ids[pair, 1, :prompt] = ids[pair, 0, :prompt]
        for row in range(2):
            used = int(random.integers(prompt + 1, seq_length + 1))
            following = np.append(ids[pair, row, 1:used], random.integers(3, vocab))
            labels[pair, row, prompt - 1 : used] = following[prompt - 1 :]
            positions[pair, row, :used] = np.arange(used)
            ids[pair, row, used:] = 0
    return PreferenceSequences(ids, labels, positions, batch_size, seed)


def torch_logps(hf: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each row's labels, and the load-balancing loss."""
    mask = torch.tensor(batch.positions_BS >= 0).long()
    output = hf(torch.tensor(batch.ids_BS).long(), attention_mask=mask, output_router_logits=True)
    labels = torch.tensor(batch.labels_BS).long()
    counted = labels != -100
    found = output.logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (found * counted).sum(-1), output.aux_loss


def torch_loss(ratio_B: torch.Tensor, lengths_B: torch.Tensor, dpo: DpoConfig) -> torch.Tensor:
    """Rafailov et al. 2023, eq. 7, smoothed; Azar et al. 2023, eq. 17, of means over tokens."""
    if dpo.loss_type == "ipo":
        mean_B = ratio_B / lengths_B
        return ((mean_B[0::2] - mean_B[1::2] - 1 / (2 * dpo.beta)) ** 2).mean()
    margin_P = dpo.beta * (ratio_B[0::2] - ratio_B[1::2])
    log_sigmoid, wrong = torch.nn.functional.logsigmoid, dpo.label_smoothing
    return -((1 - wrong) * log_sigmoid(margin_P) + wrong * log_sigmoid(-margin_P)).mean()
