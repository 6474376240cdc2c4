"""MindFormers' classes and ours beside them, for the files that need no process of their own."""

from types import SimpleNamespace

import pytest

from mistral_ms import mindformers


@pytest.fixture(scope="session")
def mf():
    """The classes; imported where they are used, for it takes seconds."""
    # this very directory passes for a package of the name mindformers: of what is in the real one
    pytest.importorskip("mindformers.core", reason="MindFormers is not installed")
    from mindformers.core.lr import CosineWithWarmUpLR
    from mindformers.core.optim import AdamW
    from mindformers.core.parallel_config import build_parallel_config
    from mindformers.models.auto import AutoConfig, AutoModel, AutoModelForCausalLM
    from mindformers.models.build_model import build_network
    from mindformers.modules.transformer.moe import MoEConfig
    from mindformers.tools.register import (
        MindFormerConfig,
        MindFormerModuleType,
        MindFormerRegister,
    )
    from mindformers.wrapper import MFTrainOneStepCell

    from mistral_ms.mindformers import graph, registration

    return SimpleNamespace(
        **{name: getattr(registration, name) for name in mindformers.__all__},
        run_of=graph.run_of,
        prediction_of=graph.prediction_of,
        AdamW=AdamW,
        CosineWithWarmUpLR=CosineWithWarmUpLR,
        MoEConfig=MoEConfig,
        MindFormerConfig=MindFormerConfig,
        build_parallel_config=build_parallel_config,
        build_network=build_network,
        kinds=MindFormerModuleType,
        registered=MindFormerRegister.get_cls,
        MFTrainOneStepCell=MFTrainOneStepCell,
        made=MindFormerRegister.get_instance_from_cfg,
        AutoConfig=AutoConfig,
        AutoModels=(AutoModel, AutoModelForCausalLM),
    )
