"""AWQ and GPTQ in four bits, as ``quantization_config`` of a Hugging Face ``config.json`` says it.

Sources: ``AwqConfig`` and ``GPTQConfig`` of transformers 4.57, and the keys that AutoAWQ, AutoGPTQ
and GPTQModel write. A key that would change what the numbers mean is understood or refused; those
of making and running the model have no effect; any other is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mistral_ms.config.tables import mapping, refuse_unknown
from mistral_ms.errors import ConfigError

_HARMLESS = {
    "awq": (
        "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert",
        "exllama_config", "quant_method",
    ),
    "gptq": (
        "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment",
        "damp_percent", "dataset", "desc_act", "exllama_config", "hyb_act", "lm_head",
        "max_input_length", "meta", "model_file_base_name", "model_name_or_path", "model_seqlen",
        "module_name_preceding_first_block", "modules_in_block_to_quantize", "mse", "pad_token_id",
        "quant_method", "quantizer", "static_groups", "tokenizer", "true_sequential",
        "use_cuda_fp16", "use_exllama", "disable_exllama", "backend",
    ),
}  # fmt: skip
# key -> the values that mean what is implemented, the first one where it is not there
_FIXED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "awq": {
        "bits": (4,),
        "zero_point": (True,),
        "version": ("gemm", "GEMM"),
        "backend": ("autoawq",),
    },
    "gptq": {
        "bits": (4,),
        "pack_dtype": ("int32",),
        "is_marlin_format": (False, None),
        "dynamic": (None, {}),
        "adapter": (None, {}),
    },
}
_FORMATS = {None: 1, "gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True)
class PackedQuantization:
    """How matrices are packed.

    Attributes:
        method: ``awq`` (AutoAWQ's gemm) or ``gptq``.
        group_size: inputs that share a scale and a zero point; None: all of them do.
        zero_offset: what is added to a stored zero point, of which four bits count: 1 in the first
            format of GPTQ.
        symmetric: every zero point must be 8.
    """

    method: Literal["awq", "gptq"]
    group_size: int | None
    zero_offset: int
    symmetric: bool

    def __str__(self) -> str:
        shared = "all inputs" if self.group_size is None else f"each {self.group_size} inputs"
        return f"{self.method.upper()} in 4 bits, a scale and a zero point for {shared}"


def read_packed_quantization(value: Any, where: str) -> PackedQuantization:
    """Reads a ``quantization_config``.

    Args:
        value: of the key.
        where: the file and the key, for messages.

    Raises:
        ConfigError: another method, or settings that are not known.
    """
    keys = mapping(value, where)
    method = keys.get("quant_method")
    if method not in ("awq", "gptq"):
        raise _refused(f"{where}.quant_method", method, "known are awq and gptq, in four bits")
    for key, allowed in _FIXED[method].items():
        found = keys.pop(key, allowed[0])
        if found not in allowed:
            rule = f"of {method} it must be {allowed[0]}"
            raise _refused(f"{where}.{key}", found, rule)
    group = keys.pop("group_size", None)
    whole = isinstance(group, int) and not isinstance(group, bool) and (group == -1 or group > 0)
    if not whole:
        rule = f"of {method} it must be -1 or a positive number"
        raise _refused(f"{where}.group_size", group, rule)
    offset, symmetric = 0, False
    if method == "gptq":
        form = keys.pop("checkpoint_format", keys.pop("format", None))
        keys.pop("format", None)
        if form not in _FORMATS:
            raise _refused(f"{where}.checkpoint_format", form, "known are gptq and gptq_v2")
        offset, symmetric = _FORMATS[form], keys.pop("sym", False) is True
    known = _HARMLESS[method]
    refuse_unknown({key: each for key, each in keys.items() if key not in known}, where)
    return PackedQuantization(method, None if group == -1 else group, offset, symmetric)


def _refused(where: str, value: Any, rule: str) -> ConfigError:
    return ConfigError(
        "quantised weights",
        where=where,
        value="?" if value is None else value,
        rule=rule,
        todo="use the model's unquantised repository, in float32, float16 or bfloat16",
    )
