"""The models that MindFormers trains, evaluates and generates with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mindspore as ms
from mindformers.models.modeling_utils import PreTrainedModel
from mindspore import Parameter, Tensor, ops
from mindspore.nn.utils import no_init_parameters

from mistral_ms.checkpoint import open_checkpoint
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.checkpoint.save import save_model
from mistral_ms.config import IGNORE_INDEX
from mistral_ms.errors import CheckpointError, ConfigError
from mistral_ms.layers import CacheSpec
from mistral_ms.mindformers.config import MistralConfig, MixtralConfig
from mistral_ms.mindformers.generation import CachedGeneration
from mistral_ms.mindformers.graph import build_generator, build_graph, is_divided
from mistral_ms.mindformers.layers import SwitchedLayerFactory
from mistral_ms.mindformers.weights import (
    converted_name,
    converted_weights,
    experts_of,
    is_legacy,
    open_same,
)
from mistral_ms.models import CausalLM, Objective, recompute
from mistral_ms.parallel.graph import GraphNextToken

_max = ops.ReduceMax(keep_dims=True)
_arange = ops.Range()

_DOWNLOADING = frozenset(
    {
        *("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder"),
        *("resume_download", "proxies", "trust_remote_code", "ignore_mismatched_sizes"),
        *("output_loading_info", "state_dict", "mirror", "variant", "auto_trans_ckpt"),
    }
)
"""What MindFormers hands to every ``from_pretrained``, its private names apart."""


class MistralForCausalLM(CachedGeneration, PreTrainedModel):
    """Mistral; in one process, or divided by MindSpore's auto-parallel graph, for training or with
    ``use_past`` for generation.

    Whole sequences without ``use_past``, with it a cache of ``batch_size`` sequences of
    ``seq_length`` positions. Tokens behind the last one that is not ``pad_token_id`` are padding:
    never seen, never routed, never counted. Parameters have the names of our checkpoints.

    Args:
        config: its configuration.

    Raises:
        ConfigError: see :meth:`MistralConfig.architecture`; a dtype that the device cannot
            compute in; a layout that cannot be.
    """

    config_class = MistralConfig
    base_model_prefix = "objective"

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config, auto_prefix=True)
        self.use_past = config.use_past
        pad = config.pad_token_id
        self.pad_token_id = -1 if pad is None else pad
        self.ignore_token_id = config.ignore_token_id
        self.divided = is_divided()
        if self.divided and config.use_past:
            self.net = build_generator(config)
            self._next_token_logits = self.net.__call__
        elif self.divided:
            self.net, self.sharding, self.run_config = build_graph(config)
        else:
            self.objective = self._alone(config)
        for name, parameter in self.weights().items():
            parameter.name = name
        if ms.get_context("device_target") == "CPU":
            self.argmax = ops.argmax  # the generator's own has no kernel there
        if config.weights_from and not (self.divided and config.use_past):
            self._read(Path(config.weights_from))
        elif not self.divided and not any(each.has_init for each in self.weights().values()):
            self.language_model.initialize(config.seed)
        self.load_checkpoint(config)

    def _read(self, path: Path) -> None:
        """Fills the weights from a whole checkpoint of any known format, one after the other."""
        if self.divided:
            raise ConfigError(
                "checkpoint of one process",
                where="model_config.weights_from",
                value=path,
                rule="several processes read theirs by load_checkpoint, see docs/mindformers.md",
            )
        with open_same(path, self.language_model.config) as source:
            load_weights(source, self.weights())

    def _alone(self, config: MistralConfig) -> Objective:
        """The model of one process, and its loss."""
        architecture, dtype = config.architecture(), config.weight_dtype
        _check_device(dtype)
        cache = None
        if config.use_past:
            length = config.seq_length
            cache = CacheSpec.for_model(architecture, config.batch_size, length, length)
        routing = config.routing(training=not config.use_past)
        model = CausalLM(
            architecture,
            routing,
            cache=cache,
            dtype=dtype,
            positions=config.seq_length,
            layer_factory=SwitchedLayerFactory(architecture, routing, cache, dtype),
        )
        recompute(model.layers, "none" if config.use_past else config.recompute)
        if cache is not None:
            self.make_steps(model)
        aux, z = config.router_loss_coefficients()
        return Objective(model, router_aux_loss_coef=aux, router_z_loss_coef=z)

    def weights(self) -> dict[str, Parameter]:
        """All weights by the names of our checkpoints."""
        return self.net.weights() if self.divided else self.objective.model.weights()

    @property
    def language_model(self) -> CausalLM | GraphNextToken:
        """The model itself in one process; of several, that generate, their graph."""
        return self.net if self.divided else self.objective.model

    def construct(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        input_position: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_embeds: Tensor | None = None,
        init_reset: Tensor | None = None,
        batch_valid_length: Tensor | None = None,
        batch_index: Tensor | None = None,
        zactivate_len: Tensor | None = None,
        block_tables: Tensor | None = None,
        slot_mapping: Tensor | None = None,
    ) -> Any:
        """The loss in training; outside of it logits.

        Where the graph is divided, the first six arguments are those of
        :class:`~mistral_ms.parallel.graph.model.GraphModel`, which a step of
        :mod:`mistral_ms.mindformers.wrapper` makes.

        Args:
            input_ids: int32 tokens; in training [B, S + 1], a sequence and the token after it.
            labels: int32, of the shape of ``input_ids``, ``ignore_token_id`` where nothing is
                predicted; None: the tokens themselves.
            input_position: unused, as are the others: the arguments of MindFormers' Llama.
            position_ids: unused.
            attention_mask: unused.
            input_embeds: unused.
            init_reset: unused.
            batch_valid_length: unused.
            batch_index: unused.
            zactivate_len: unused.
            block_tables: unused.
            slot_mapping: unused.

        Returns:
            In training a float32 scalar. Else the logits [B, S, V], the tokens [B, S], and which
            of them count, float32 [B, S]: what MindFormers' metrics take.
        """
        if self.divided:
            return self.net(
                input_ids, labels, input_position, position_ids, attention_mask, input_embeds
            )
        if self.training:
            tokens, targets, positions = self.next_tokens(input_ids, labels)
            total, _ = self.objective(tokens, targets, positions)
            return total
        logits = self.objective.model(input_ids, self.positions(input_ids))
        counted = ops.cast(input_ids != self.pad_token_id, ms.float32)
        if labels is not None:
            counted = counted * ops.cast(labels != self.ignore_token_id, ms.float32)
        return logits, input_ids, counted

    def next_tokens(
        self, input_ids: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the objective takes of a batch in training: tokens, labels, positions [B, S].

        As in MindFormers the label of a padding token does not count, and that of a last token
        before padding does.
        """
        tokens = input_ids[:, :-1]
        targets = input_ids[:, 1:] if labels is None else labels[:, 1:]
        ignored = tokens == self.pad_token_id
        ignored = ops.logical_or(ignored, targets == self.ignore_token_id)
        nothing = ops.fill(ms.int32, targets.shape, IGNORE_INDEX)
        targets = ops.select(ignored, nothing, ops.cast(targets, ms.int32))
        return tokens, targets, self.positions(tokens)

    def positions(self, tokens_BS: Tensor) -> Tensor:
        """int32 [B, S]: 0, 1, ...; -1 behind the last token that is not padding."""
        B, S = tokens_BS.shape
        column = ops.broadcast_to(_arange(0, S, 1).reshape(1, S), (B, S))
        column = ops.cast(column, ms.int32)
        absent = ops.fill(ms.int32, (B, S), -1)
        last = _max(ops.select(tokens_BS != self.pad_token_id, column, absent), 1)
        return ops.select(column <= last, column, absent)

    # ---- weights, as MindFormers asks for them

    def get_model_parameters(self, only_trainable: bool = True) -> list[Parameter]:
        """The weights."""
        return [
            each for each in self.weights().values() if each.requires_grad or not only_trainable
        ]

    def init_parameters_data(self, auto_parallel_mode: bool = False) -> Any:
        """Called by the trainer when a checkpoint was loaded.

        Raises:
            CheckpointError: weights that the checkpoint did not have, of which MindFormers only
                writes a line into its log.
        """
        weights = self.weights()
        if self.divided:  # of this process' stage alone
            weights = {name: each for name, each in weights.items() if each.sliced}
        if missing := [name for name, each in weights.items() if each.has_init]:
            raise CheckpointError(
                "missing tensor",
                where="load_checkpoint",
                value=", ".join(missing[:3]),
                rule=f"the checkpoint lacks {len(missing)} of {len(weights)} weights",
                todo="set model_config.weights_from in the place of load_checkpoint (python -m "
                "mistral_ms.mindformers.run does): it reads every format",
            )
        return super().init_parameters_data(auto_parallel_mode)

    @classmethod
    def convert_name(cls, name: str) -> str:
        """Our name of a tensor of Hugging Face's or of MindFormers 1.x; other names stay."""
        return converted_name(name)

    @classmethod
    def convert_weight_dict(
        cls, source: Mapping[str, Parameter], **kwargs: Any
    ) -> dict[str, Parameter]:
        """All tensors of a checkpoint of others under our names, experts stacked.

        Args:
            source: by the names of Hugging Face or of MindFormers 1.x.
            kwargs: ``model_config``, the trainer's, which does not say how many experts there are:
                the tensors do.

        Raises:
            CheckpointError: missing or extra tensors, wrong shapes.
        """
        keys = experts_of(source) | dict(kwargs.get("model_config") or {})
        for key in ("type", "auto_register"):
            keys.pop(key, None)
        return converted_weights(source, cls.config_class(**keys).architecture())

    def fuse_weight_from_ckpt(self, ckpt_dict: Mapping[str, Parameter]) -> Mapping[str, Parameter]:
        """Called by MindFormers with what it has read of ``.ckpt`` files.

        Raises:
            CheckpointError: see :meth:`convert_weight_dict`.
        """
        if not is_legacy(ckpt_dict):
            return ckpt_dict
        return converted_weights(ckpt_dict, self.language_model.config)

    @classmethod
    def convert_map_dict(cls, source: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        """The index of a checkpoint under our names."""
        return {converted_name(name): value for name, value in source.items()}

    @classmethod
    def obtain_qkv_ffn_concat_keys(cls) -> None:
        """Nothing is stored together."""

    def obtain_name_map(self, files: Any) -> dict[str, str]:
        """Asked for where several processes load a Hugging Face checkpoint.

        Raises:
            CheckpointError: always; a map of names cannot stack experts.
        """
        raise CheckpointError(
            "checkpoint to be converted",
            where="load_checkpoint",
            rule="several processes read checkpoints whose tensors are those of the model",
            todo="python run_mixtral.py convert SRC DST --to mindformers --layout graph "
            "--dtype fp32, and load DST",
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_dir: str | Path, *model_args: Any, **kwargs: Any
    ) -> MistralForCausalLM:
        """As :meth:`from_pretrained_experimental_mode` of every directory and file that is there;
        also of MindFormers 1.x, whose yaml file describes a class of its own.

        Args:
            pretrained_model_name_or_dir: a checkpoint.
            model_args: none.
            kwargs: keys of the configuration.
        """
        if Path(pretrained_model_name_or_dir).exists():
            return cls.from_pretrained_experimental_mode(pretrained_model_name_or_dir, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_dir, *model_args, **kwargs)

    @classmethod
    def from_pretrained_experimental_mode(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        config: MistralConfig | None = None,
        **kwargs: Any,
    ) -> MistralForCausalLM:
        """Opens a checkpoint of Hugging Face, Mistral, MindFormers 1.x or ours; experts are read
        one at a time.

        Args:
            pretrained_model_name_or_path: its directory; or a file that MindFormers has written.
            model_args: none.
            config: the configuration; that of the checkpoint when None.
            kwargs: keys of the configuration.

        Raises:
            CheckpointError: see :func:`~mistral_ms.checkpoint.open_checkpoint`.
            ConfigError: see the class.
        """
        keys = {
            key: value
            for key, value in kwargs.items()
            if key not in _DOWNLOADING and not key.startswith("_")
        }
        known = None if config is None else config.architecture()
        with open_checkpoint(Path(pretrained_model_name_or_path), config=known) as source:
            if config is None:
                config = cls.config_class.of(source.config, **keys)
            with no_init_parameters():  # nothing is drawn that is read
                model = cls(config)
            load_weights(source, model.weights())
        model.init_parameters_data()
        model.set_train(False)
        return model

    def save_pretrained(
        self,
        save_directory: str | Path,
        save_name: str | None = None,
        *,
        to: str = "mistral_ms",
        **kwargs: Any,
    ) -> None:
        """Writes the model as a checkpoint that :meth:`from_pretrained` reads.

        Args:
            save_directory: its directory, which must not be there.
            save_name: unused; checkpoints of both formats name their files themselves.
            to: ``mistral_ms``, or ``hf`` for Hugging Face's.
            kwargs: unused.

        Raises:
            CheckpointError: something is at the place, or a full disk.
            ConfigError: this process has parts of the weights.
        """
        if self.divided:
            raise ConfigError(
                "parts of a model",
                where="save_pretrained",
                rule="MindSpore has divided the weights among processes",
                todo="convert what MindFormers saves: run_mixtral.py convert --strategy",
            )
        model = self.language_model
        save_model(Path(save_directory), model.config, model.weights(), to)


class MixtralForCausalLM(MistralForCausalLM):
    """Mixtral: experts in every layer; see the base."""

    config_class = MixtralConfig


def _check_device(dtype: str) -> None:
    if dtype == "bfloat16" and ms.get_context("device_target") == "CPU":
        raise ConfigError(
            "dtype without kernels",
            where="model_config.param_init_type",
            value="bfloat16 on CPU",
            rule="MindSpore's CPU back end multiplies float32 and (slowly) float16 matrices only",
            todo="use float32 here; bfloat16 is for Ascend",
        )
