"""For MindFormers' own launcher: ``run_mindformer.py --register_path DIRECTORY_OF_THIS_FILE``.

In the configuration file, beside each ``type``::

    model_config:
      type: MixtralConfig
      auto_register: mixtral_shim.MixtralConfig
    arch:
      type: MixtralForCausalLM
      auto_register: mixtral_shim.MixtralForCausalLM
"""

from mistral_ms.mindformers import (
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

__all__ = ["MistralConfig", "MistralForCausalLM", "MixtralConfig", "MixtralForCausalLM"]
