"""``generation_config.json``: what a checkpoint says about generating with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistral_ms.errors import ConfigError
from mistral_ms.reading import read_json

GENERATION_FILE = "generation_config.json"
# Keys that say nothing about which tokens come out.
HARMLESS = frozenset(
    (
        "_from_model_config",
        "transformers_version",
        "max_length",
        "max_new_tokens",
        "use_cache",
        "_commit_hash",
        "cache_implementation",
        "cache_config",
        "return_legacy_cache",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "output_router_logits",
        "return_dict_in_generate",
        "disable_compile",
        "compile_config",
        "decoder_start_token_id",
        "prefill_chunk_size",
        "max_time",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "is_assistant",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "prompt_lookup_num_tokens",
        "trust_remote_code",
    )
)
# Settings that change what comes out and are not offered here, with what changes nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "early_stopping": (False,),
    "diversity_penalty": (0,),
    "length_penalty": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "min_p": (0,),
    "top_h": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "dola_layers": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "bad_words_ids": (),
    "force_words_ids": (),
    "constraints": (),
    "sequence_bias": (),
    "token_healing": (False,),
    "guidance_scale": (1,),
    "low_memory": (False,),
    "watermarking_config": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ((), []),
    "begin_suppress_tokens": ((), []),
    "forced_decoder_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "stop_strings": ((), []),
}
_NUMBERS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class GenerationFile:
    """The settings of one checkpoint.

    Attributes:
        path: the file; None when there is none.
        eos_token_ids: tokens that end a text; None when the file does not say.
        bos_token_id: begins a text.
        pad_token_id: fills short rows; never a part of a text.
        sampling: how its authors sample, as :class:`~mistral_ms.config.GenerationConfig` names
            it: what transformers would do with the file. Greedy decoding keeps the penalty alone.
        unsupported: settings that are not offered here, with their values.
    """

    path: Path | None = None
    eos_token_ids: tuple[int, ...] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)
    unsupported: Mapping[str, Any] = field(default_factory=dict)


def read_generation_file(directory: Path) -> GenerationFile:
    """Reads ``generation_config.json`` of a checkpoint's directory, if there is one.

    Raises:
        ConfigError: it cannot be read, or holds a value of a wrong type.
    """
    path = Path(directory) / GENERATION_FILE
    if not path.exists():
        return GenerationFile()
    values = read_json(path, ConfigError)
    eos = values.get("eos_token_id")
    ids = None if eos is None else eos if isinstance(eos, list) else [eos]
    for number in ids or ():
        _check_id(path, "eos_token_id", number)
    for key in ("bos_token_id", "pad_token_id"):
        if values.get(key) is not None:
            _check_id(path, key, values[key])
    known = {"eos_token_id", "bos_token_id", "pad_token_id", "do_sample", *_NUMBERS, *HARMLESS}
    unsupported = {
        key: value
        for key, value in values.items()
        if key not in known and value is not None and value not in NEUTRAL.get(key, ())
    }
    return GenerationFile(
        path=path,
        eos_token_ids=None if ids is None else tuple(ids),
        bos_token_id=values.get("bos_token_id"),
        pad_token_id=values.get("pad_token_id"),
        sampling=_sampling(path, values),
        unsupported=unsupported,
    )


def read_end_tokens(directory: Path) -> tuple[int, ...]:
    """The end tokens that a model's directory names; none when it does not say.

    Those of ``generation_config.json`` count, else those of ``config.json``.

    Raises:
        ConfigError: a file that cannot be read, or a value that is not a token id.
    """
    found = read_generation_file(directory).eos_token_ids
    path = Path(directory) / "config.json"
    if found is not None or not path.exists():
        return found or ()
    eos = read_json(path, ConfigError).get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    for number in ids:
        _check_id(path, "eos_token_id", number)
    return tuple(ids)


def _sampling(path: Path, values: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for key, default in _NUMBERS.items():
        value = values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _damaged(path, f"{key}: {value!r}", "must be a number")
        found[key] = value
    sample = values.get("do_sample")
    if sample is not None and not isinstance(sample, bool):
        raise _damaged(path, f"do_sample: {sample!r}", "must be true or false")
    if not sample:
        return {k: v for k, v in found.items() if k == "repetition_penalty" and v != 1}
    return found


def _check_id(path: Path, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _damaged(path, f"{key}: {value!r}", "must be a token id")


def _damaged(path: Path, value: object, rule: str) -> ConfigError:
    return ConfigError(
        "damaged generation settings",
        where=path,
        value=value,
        rule=rule,
        todo="correct the file, or remove it",
    )
