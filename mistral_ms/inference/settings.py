"""What a checkpoint says about generating with it, put together from all who say something."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_ms.config import ModelConfig, read_generation_file
from mistral_ms.tokenizer import Tokenizer, end_token_notes


@dataclass(frozen=True)
class CheckpointSettings:
    """How a checkpoint wants to be generated with.

    Attributes:
        eos_ids: tokens that end a text: those of generation_config.json, or of the model's
            configuration without it; and the tokenizer's.
        sampling: how its authors sample, in the names of
            :class:`~mistral_ms.config.GenerationConfig`; used only when asked for.
        notes: contradictions, and settings that are not offered here, in words.
    """

    eos_ids: tuple[int, ...]
    sampling: Mapping[str, float]
    notes: tuple[str, ...]


def read_checkpoint_settings(
    directory: Path, config: ModelConfig, tokenizer: Tokenizer | None
) -> CheckpointSettings:
    """Reads the settings of a checkpoint.

    Args:
        directory: where its files are.
        config: the model's configuration.
        tokenizer: the model's, if it is needed.

    Raises:
        ConfigError: a generation_config.json that cannot be read.
    """
    file = read_generation_file(directory)
    ends = config.eos_token_ids if file.eos_token_ids is None else file.eos_token_ids
    notes: list[str] = [] if tokenizer is None else list(tokenizer.notes)
    if not set(config.eos_token_ids) <= set(ends):
        notes.append(
            f"{file.path} ends texts with {list(ends)}, the model's configuration with "
            f"{list(config.eos_token_ids)}: the former counts"
        )
    if tokenizer is not None:
        notes += [f"{note}: both end them" for note in end_token_notes(tokenizer, ends)]
        ends = tuple(dict.fromkeys((*ends, *tokenizer.eos_ids)))
    if file.unsupported:
        shown = ", ".join(f"{key} {value!r}"[:80] for key, value in file.unsupported.items())
        notes.append(f"{file.path}: not supported and not used: {shown}")
    return CheckpointSettings(ends, file.sampling, tuple(notes))
