"""Frozen, typed configuration: read once at the edge, passed down as plain data."""

from mistral_ms.config.capacity import expert_capacity, local_groups
from mistral_ms.config.conventions import IGNORE_INDEX, PACKAGED_TOKENIZER
from mistral_ms.config.data import DataConfig, DataSourceConfig, PackingConfig
from mistral_ms.config.evaluation import EvaluationConfig
from mistral_ms.config.extensions import when_unknown
from mistral_ms.config.gates import (
    GateSettings,
    SoftmaxTopKSettings,
    register_gate_settings,
)
from mistral_ms.config.generation import GenerationConfig
from mistral_ms.config.generation_file import (
    GenerationFile,
    read_end_tokens,
    read_generation_file,
)
from mistral_ms.config.hugging_face import from_hf, to_hf, to_native
from mistral_ms.config.load import apply_overrides, load_model_config, read_yaml
from mistral_ms.config.lora import LoraConfig
from mistral_ms.config.mindformers_yaml import (
    from_mindformers,
    read_mindformers,
    to_mindformers,
)
from mistral_ms.config.mistral_params import from_mistral, to_mistral
from mistral_ms.config.model import DType, LayerKinds, ModelConfig
from mistral_ms.config.moe import MoEArchitecture
from mistral_ms.config.parallel import ParallelConfig, Recompute, layout_from_flags
from mistral_ms.config.predict import PredictConfig, PredictionConfig, load_any_config
from mistral_ms.config.preference import DpoConfig
from mistral_ms.config.rope_scaling import RopeScaling
from mistral_ms.config.routes import any_layout, even_hops, register_route_name
from mistral_ms.config.routing import DROPLESS, RoutingConfig
from mistral_ms.config.run import (
    CheckpointConfig,
    CheckpointFormat,
    DistillationConfig,
    InitFromConfig,
    RunConfig,
    load_run_config,
    spelled_out,
)
from mistral_ms.config.training import (
    LossScaleConfig,
    OptimizerConfig,
    ParamGroupConfig,
    TrainingConfig,
)
from mistral_ms.config.yaml_text import encode_yaml

__all__ = [
    "DROPLESS",
    "IGNORE_INDEX",
    "PACKAGED_TOKENIZER",
    "CheckpointConfig",
    "CheckpointFormat",
    "DType",
    "DataConfig",
    "DataSourceConfig",
    "DistillationConfig",
    "DpoConfig",
    "EvaluationConfig",
    "GateSettings",
    "GenerationConfig",
    "GenerationFile",
    "InitFromConfig",
    "LayerKinds",
    "LoraConfig",
    "LossScaleConfig",
    "MoEArchitecture",
    "ModelConfig",
    "OptimizerConfig",
    "PackingConfig",
    "ParallelConfig",
    "ParamGroupConfig",
    "PredictConfig",
    "PredictionConfig",
    "Recompute",
    "RopeScaling",
    "RoutingConfig",
    "RunConfig",
    "SoftmaxTopKSettings",
    "TrainingConfig",
    "any_layout",
    "apply_overrides",
    "encode_yaml",
    "even_hops",
    "expert_capacity",
    "from_hf",
    "from_mindformers",
    "from_mistral",
    "layout_from_flags",
    "load_any_config",
    "load_model_config",
    "load_run_config",
    "local_groups",
    "read_end_tokens",
    "read_generation_file",
    "read_mindformers",
    "read_yaml",
    "register_gate_settings",
    "register_route_name",
    "spelled_out",
    "to_hf",
    "to_mindformers",
    "to_mistral",
    "to_native",
    "when_unknown",
]
