"""Makes the classes known to MindFormers, under their names and in its Auto classes."""

from __future__ import annotations

from mindformers.models.auto import AutoConfig, AutoModel, AutoModelForCausalLM
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from mistral_ms.mindformers.config import MistralConfig, MixtralConfig
from mistral_ms.mindformers.modeling import MistralForCausalLM, MixtralForCausalLM
from mistral_ms.mindformers.monitor import RouterMonitor
from mistral_ms.mindformers.wrapper import MoEPipelineTrainOneStepCell, MoETrainOneStepCell

for _config, _model in (
    (MixtralConfig, MixtralForCausalLM),
    (MistralConfig, MistralForCausalLM),
):
    MindFormerRegister.register_cls(_config, MindFormerModuleType.CONFIG)
    MindFormerRegister.register_cls(_model, MindFormerModuleType.MODELS)
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
MindFormerRegister.register_cls(RouterMonitor, MindFormerModuleType.CALLBACK)
# also under their names: configuration files of MindFormers need not change then, and its trainer
# sets the second one whatever a file says; other models' steps stay as they are
for _step, _name in (
    (MoETrainOneStepCell, "MFTrainOneStepCell"),
    (MoEPipelineTrainOneStepCell, "MFPipelineWithLossScaleCell"),
):
    MindFormerRegister.register_cls(_step, MindFormerModuleType.WRAPPER)
    MindFormerRegister.register_cls(_step, MindFormerModuleType.WRAPPER, alias=_name)
