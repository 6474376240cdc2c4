"""The configurations that MindFormers builds from ``model_config``.

MindFormers' trainer sets ``moe_config``, ``parallel_config`` and others as attributes after a
configuration was built, and users change attributes too. So names are checked at once, values when
a model is built: :meth:`MistralConfig.architecture` and its siblings read what is there then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.modules.transformer.moe import MoEConfig
from mindformers.modules.transformer.transformer import (
    TransformerOpParallelConfig,
    default_transformer_config,
)

from mistral_ms.config import ModelConfig, Recompute, RoutingConfig, from_hf
from mistral_ms.config.base import validate
from mistral_ms.config.hugging_face import to_native
from mistral_ms.config.hugging_face_keys import (
    HF_CLASS_DEFAULTS,
    HF_DENSE_HARMLESS,
    HF_HARMLESS,
    HF_KEYS,
    HF_MOE_KEYS,
    HF_NEUTRAL,
)
from mistral_ms.config.mindformers_keys import (
    ARCHITECTURE_DEFAULTS,
    BASE_ATTRIBUTES,
    FIXED,
    MOE_FIXED,
    MOE_READ,
    MOE_WITHOUT_EFFECT,
    OURS,
    RECOMPUTE_FIXED,
    RENAMED,
    THEIRS,
    WITHOUT_EFFECT,
    check_fixed,
)
from mistral_ms.config.names import perhaps
from mistral_ms.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self  # of Python 3.11

WHERE = "model_config"

_HF = {
    *(*HF_KEYS, *HF_MOE_KEYS, *HF_NEUTRAL, *HF_HARMLESS),
    *("rope_scaling", "rope_parameters", "layer_types", "dtype", "architectures", "auto_map"),
    *("model_type", "mistral_ms"),
}
_APART = {*OURS, *THEIRS, *FIXED, *WITHOUT_EFFECT, *BASE_ATTRIBUTES}
"""What says nothing of the architecture."""
KNOWN = frozenset({*_HF, *RENAMED, *_APART})


class MistralConfig(PretrainedConfig):
    """Mistral: a dense decoder.

    Args:
        parallel_config: the layout.
        moe_config: the experts' settings; those of a dense model say nothing.
        keys: those of ``LlamaConfig``, of Hugging Face's ``config.json``, and of
            :data:`~mistral_ms.config.mindformers_keys.OURS`.

    Raises:
        ConfigError: an unknown key, or one that is given under two names.
    """

    model_type = "mistral"
    attribute_map: ClassVar[dict[str, str]] = dict(RENAMED)

    def __init__(
        self,
        parallel_config: TransformerOpParallelConfig | Mapping[str, Any] | None = None,
        moe_config: MoEConfig | Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> None:
        given = _hugging_face_names(keys)
        if given.get("intermediate_size", ...) is None or (
            "intermediate_size" not in given and "multiple_of" in given
        ):
            raise ConfigError(
                "missing key",
                where=f"{WHERE}.intermediate_size",
                rule="it is not derived from hidden_size, multiple_of and ffn_dim_multiplier",
                todo="14336 for Mistral 7B and Mixtral 8x7B",
            )
        defaults = {**ARCHITECTURE_DEFAULTS, **HF_CLASS_DEFAULTS[self.model_type], **OURS, **THEIRS}
        if "seq_length" not in given and given.get("max_position_embeddings"):
            longest = int(given["max_position_embeddings"])
            defaults["seq_length"] = min(defaults["seq_length"], longest)
        if isinstance(parallel_config, Mapping):
            parallel_config = TransformerOpParallelConfig(**parallel_config)
        given.pop("model_type", None)
        super().__init__(
            parallel_config=default_transformer_config
            if parallel_config is None
            else parallel_config,
            **{**defaults, **given},
        )
        if moe_config is None or isinstance(moe_config, Mapping):
            moe_config = MoEConfig(**(moe_config or {}))
        self.moe_config: MoEConfig = moe_config

    @classmethod
    def of(cls, architecture: ModelConfig, **keys: Any) -> Self:
        """The configuration of a model of ours.

        Args:
            architecture: the model.
            keys: further ones, as of the constructor.
        """
        return cls(**{**to_native(architecture), **keys})

    def architecture(self) -> ModelConfig:
        """The model.

        Raises:
            ConfigError: a value that is not supported, named with the reason.
        """
        held = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        for key, fixed in FIXED.items():
            check_fixed(f"{WHERE}.{key}", held.get(key, ...), fixed)
        values = {key: value for key, value in held.items() if key not in _APART}
        for key in ("pad_token_id", "bos_token_id"):
            if isinstance(values.get(key), int) and values[key] < 0:
                values[key] = None  # MindFormers' way of saying: none
        values |= self._experts()
        values["model_type"] = self.model_type
        config, _ = from_hf(values, WHERE)
        if self.seq_length > config.longest_sequence:
            raise ConfigError(
                "sequence too long",
                where=f"{WHERE}.seq_length",
                value=self.seq_length,
                rule=config.length_rule,
            )
        return config

    def routing(self, training: bool) -> RoutingConfig:
        """How tokens are routed: outside of training every choice is computed."""
        return RoutingConfig()

    def router_loss_coefficients(self) -> tuple[float, float]:
        """Of the load-balancing loss and of the z-loss."""
        return 0.0, 0.0

    @property
    def weight_dtype(self) -> str:
        """What the model of one process holds and computes in: with a cache ``compute_dtype``,
        else ``param_init_type``.
        """
        key = "compute_dtype" if self.use_past else "param_init_type"
        return dtype_name(getattr(self, key), f"{WHERE}.{key}")

    @property
    def recompute(self) -> Recompute:
        """What the backward pass computes again, of ``recompute_config``.

        Raises:
            ConfigError: numbers of layers, or names of operators, instead of yes or no; a value
                that is not supported, named with the reason.
        """
        settings = self.parallel_config.recompute
        if isinstance(settings, bool):
            return "full" if settings else "none"
        for key, fixed in RECOMPUTE_FIXED.items():
            check_fixed(f"recompute_config.{key}", getattr(settings, key, ...), fixed)
        for key in ("recompute", "select_recompute"):
            if not isinstance(value := getattr(settings, key), bool):
                raise ConfigError(
                    "unsupported value",
                    where=f"recompute_config.{key}",
                    value=repr(value),
                    rule="of all blocks the same is computed again",
                    todo="set recompute: True, or select_recompute: True",
                )
        if settings.recompute:
            return "full"
        return "selective" if settings.select_recompute else "none"

    def _experts(self) -> dict[str, Any]:
        """Hugging Face's keys of the experts."""
        if self.moe_config.expert_num > 1:
            raise ConfigError(
                "contradiction",
                where="moe_config.expert_num",
                value=self.moe_config.expert_num,
                rule="a model of type mistral has no experts",
                todo="use MixtralConfig and MixtralForCausalLM",
            )
        return {}


class MixtralConfig(MistralConfig):
    """Mixtral: experts in every layer.

    ``moe_config`` says how many experts there are, how they are chosen and what is dropped; where
    it has but one expert, ``num_local_experts``, ``num_experts_per_tok`` and
    ``router_aux_loss_coef`` of Hugging Face's ``config.json`` do, and nothing is dropped.
    """

    model_type = "mixtral"

    def routing(self, training: bool) -> RoutingConfig:
        """See the base: a capacity holds in training alone."""
        moe = self._checked_moe()
        if moe is None:
            return RoutingConfig()
        values: dict[str, Any] = {
            "router_dtype": dtype_name(moe.router_dense_type, "moe_config.router_dense_type")
        }
        if moe.use_fused_ops_topkrouter:
            values["kernels"] = "cann"
        if training and moe.capacity_factor > 0:
            values |= {
                "policy": "capacity",
                "capacity_factor": moe.capacity_factor,
                "drop_priority": "token_major" if moe.enable_sdrop else "choice_major",
                "capacity_multiple_of": self.capacity_multiple_of,
            }
        return validate(RoutingConfig, values, "moe_config")

    def router_loss_coefficients(self) -> tuple[float, float]:
        """See the base. Hugging Face's definition: a balanced router has the loss K."""
        moe = self._checked_moe()
        if moe is not None:
            return float(moe.aux_loss_factor), float(moe.z_loss_factor)
        coefficient = self.router_aux_loss_coef
        default = HF_MOE_KEYS["router_aux_loss_coef"][1]
        return float(default if coefficient is None else coefficient), self.router_z_loss_coef

    def _checked_moe(self) -> MoEConfig | None:
        """``moe_config`` where it has experts, its values checked."""
        moe = self.moe_config
        if moe.expert_num <= 1:
            return None
        for key, value in vars(moe).items():
            if key in MOE_FIXED:
                check_fixed(f"moe_config.{key}", value, MOE_FIXED[key])
            elif key not in MOE_READ and key not in MOE_WITHOUT_EFFECT:
                raise _unknown(f"moe_config.{key}", key, {*MOE_READ, *MOE_FIXED})
        return moe

    def _experts(self) -> dict[str, Any]:
        """See the base."""
        moe = self._checked_moe()
        given = {"num_local_experts": 8, "num_experts_per_tok": 2}
        held = {key: value for key in given if (value := getattr(self, key)) is not None}
        if moe is None:
            found = {**given, **held}
        else:
            found = {
                "num_local_experts": moe.expert_num,
                "num_experts_per_tok": moe.num_experts_chosen,
            }
            for key, value in held.items():
                if value != found[key]:
                    raise ConfigError(
                        "contradiction",
                        where=f"{WHERE}.{key}",
                        value=value,
                        rule=f"moe_config says {found[key]}",
                    )
            if not moe.norm_topk_prob:
                found["mistral_ms"] = {"moe": {"norm_topk_prob": False}}
        found["router_aux_loss_coef"] = self.router_loss_coefficients()[0]
        return found


def _hugging_face_names(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys under Hugging Face's names, each known and given once."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        if key not in KNOWN and not key.startswith("_") and key not in HF_DENSE_HARMLESS:
            raise _unknown(f"{WHERE}.{key}", key, KNOWN)
        name = RENAMED.get(key, key)
        if name in found and found[name] != value:
            raise ConfigError(
                "contradiction",
                where=f"{WHERE}.{key}",
                value=value,
                rule=f"{name} is given as well, as {found[name]}",
            )
        found[name] = value
    return found


def _unknown(where: str, key: str, known: set[str] | frozenset[str]) -> ConfigError:
    rule, todo = "no key is ignored", perhaps(key, sorted(known))
    return ConfigError("unknown key", where=where, rule=rule, todo=todo)


def dtype_name(value: Any, where: str) -> str:
    """What configurations of ours call a dtype: of a name, or of a dtype of MindSpore.

    Raises:
        ConfigError: no floating-point dtype.
    """
    name = str(value).rpartition(".")[2].lower()
    if name not in ("float32", "float16", "bfloat16"):
        raise ConfigError(
            "unknown dtype",
            where=where,
            value=repr(value),
            rule="must be float32, float16 or bfloat16",
        )
    return name
