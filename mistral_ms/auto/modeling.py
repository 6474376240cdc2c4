"""Causal language models with the habits of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mistral_ms.auto.generation import GenerationMixin
from mistral_ms.auto.inputs import beside, check_labels, next_labels, positions_of, token_ids
from mistral_ms.auto.tokenization import PreTrainedTokenizer
from mistral_ms.checkpoint import open_merged, tokenizer_files
from mistral_ms.checkpoint.adapters import open_adapter
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.checkpoint.merged import merge_into
from mistral_ms.checkpoint.save import save_model
from mistral_ms.config import (
    DROPLESS,
    DType,
    LoraConfig,
    ModelConfig,
)
from mistral_ms.config.base import validate
from mistral_ms.errors import CheckpointError, ConfigError
from mistral_ms.inference.dtypes import check_dtype
from mistral_ms.inference.lengths import check_length
from mistral_ms.inference.settings import read_checkpoint_settings
from mistral_ms.layers import output_logits, token_nll
from mistral_ms.models import CausalLM
from mistral_ms.moe import load_balancing_loss
from mistral_ms.ops.modes import pynative_mode
from mistral_ms.tokenizer import check_vocabulary, has_tokenizer, load_tokenizer

_sum = ops.ReduceSum()


@dataclass(frozen=True)
class CausalLMOutput:
    """What a model gives.

    Attributes:
        logits: float32 [B, S, V].
        loss: float32 scalar, the mean over the labels that count, plus the load-balancing loss
            times its coefficient where that was asked for; None without labels.
        aux_loss: the load-balancing loss by Hugging Face's definition, float32 scalar; None where
            it was not asked for, and of a dense model.
        router_logits: float32 [B * S, E] of each sparse layer; likewise.
    """

    logits: Tensor
    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


class PreTrainedModel(GenerationMixin):
    """A Mistral or Mixtral in this process.

    Args:
        config: the architecture.
        dtype: of weights and activations; the CPU has no bfloat16.
        seed: of the weights, which are drawn.
        tokenizer: for texts in and out; without one the model takes and gives ids alone.
        eos_ids: tokens that end a text; those of the configuration when None.

    Attributes:
        model: the :class:`~mistral_ms.models.CausalLM`, a Cell: what ``mindspore.value_and_grad``
            and the objectives of :mod:`mistral_ms.models` take.
        config: the architecture.
        tokenizer: the tokenizer, or None.
        eos_ids: tokens that end a text.

    Raises:
        ConfigError: a dtype that the device cannot compute in; an architecture of the other class.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DType = "float32",
        seed: int = 0,
        tokenizer: PreTrainedTokenizer | None = None,
        eos_ids: Sequence[int] | None = None,
    ) -> None:
        self._check_kind(config, "config")
        check_dtype(dtype)
        self._set(CausalLM(config, DROPLESS, dtype=dtype), dtype, tokenizer, eos_ids)
        self.model.initialize(seed)

    def _set(
        self,
        model: CausalLM,
        dtype: DType,
        tokenizer: PreTrainedTokenizer | None,
        eos_ids: Sequence[int] | None,
        files: Mapping[str, bytes | Path] | None = None,
    ) -> None:
        model.set_train(False)
        self.model, self.config, self.dtype = model, model.config, dtype
        self.tokenizer = tokenizer
        self.eos_ids = tuple(model.config.eos_token_ids if eos_ids is None else eos_ids)
        self._files = dict(files or {})

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: DType = "float32",
        format: str | None = None,
        verify: bool = True,
        follow_links: bool = False,
        adapter: str | Path | None = None,
        lora: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> PreTrainedModel:
        """Reads a checkpoint of any known format, and its tokenizer if it has one.

        Args:
            path: the checkpoint's directory.
            dtype: of weights and activations; the CPU has no bfloat16.
            format: which format to read where the directory holds several.
            verify: compare a checkpoint of ours with its recorded digests.
            follow_links: links may lead out of the directory, or of the hub's cache.
            adapter: directory of an adapter of the checkpoint, PEFT's or of a training here, which
                is added to the weights.
            lora: keys of :class:`~mistral_ms.config.LoraConfig`: the model gets fresh adapters,
                which are all that a training changes and ``save_pretrained`` writes.
            seed: of these.

        Raises:
            CheckpointError: no checkpoint there, missing or extra tensors, wrong shapes, damage.
            ConfigError: a model of the other class; a dtype that the device cannot compute in.
            TokenizerError: a damaged tokenizer, or one that does not fit the model.
        """
        path = Path(path)
        check_dtype(dtype)
        if not path.is_dir():
            raise CheckpointError(
                "no checkpoint",
                where=path,
                rule="must be a directory on this machine; nothing is downloaded",
                todo="download it first, for example by huggingface-cli download",
            )
        with open_merged(
            path,
            format,
            adapter=None if adapter is None else Path(adapter),
            verify=verify,
            follow_links=follow_links,
        ) as source:
            cls._check_kind(source.config, str(path))
            files = tokenizer_files(source.path, follow_links)
            tokenizer = inner = None
            if has_tokenizer(source.path):
                inner = load_tokenizer(source.path)
                check_vocabulary(inner, source.config)
                tokenizer = PreTrainedTokenizer(inner)
            eos_ids = read_checkpoint_settings(source.path, source.config, inner).eos_ids
            config = source.config
            if lora is not None:
                adapters = validate(LoraConfig, lora, "lora")
                config = config.model_copy(update={"lora": adapters})
            model = CausalLM(config, DROPLESS, dtype=dtype)
            held = model.weights()
            load_weights(source, {name: held[name] for name in source.names()})
            if lora is not None:
                model.initialize_adapters(seed)
        found = cls.__new__(_class_of(source.config) if cls is PreTrainedModel else cls)
        found._set(model, dtype, tokenizer, eos_ids, files)
        return found

    @classmethod
    def from_config(
        cls, config: ModelConfig, *, dtype: DType = "float32", seed: int = 0
    ) -> PreTrainedModel:
        """A model with fresh weights, a function of the seed; see the class."""
        PreTrainedModel._check_kind(config, "config")
        kind = _class_of(config) if cls is PreTrainedModel else cls
        return kind(config, dtype=dtype, seed=seed)

    @classmethod
    def _check_kind(cls, config: ModelConfig, where: str) -> None:
        if not isinstance(config, ModelConfig):
            raise ConfigError(
                "no configuration",
                where=where,
                value=type(config).__name__,
                rule="AutoConfig.from_pretrained(path) and AutoConfig.for_model(**keys) make one",
            )
        kind = _class_of(config)
        if not issubclass(kind, cls):
            raise ConfigError(
                "model of another class",
                where=where,
                value=kind.__name__,
                rule=f"{cls.__name__} has {'sparse' if cls is MixtralForCausalLM else 'dense'} "
                "layers",
                todo=f"use {kind.__name__} or AutoModelForCausalLM",
            )

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        labels: Any = None,
        *,
        output_router_logits: bool = False,
    ) -> CausalLMOutput:
        """Runs whole sequences, operator by operator, each token by all experts that it chooses.

        Args:
            input_ids: int [B, S], a list of rows of equal length, an array or a tensor.
            attention_mask: [B, S], 0 for padding, wherever it stands; None: there is none.
                Positions count from 0 at the first token of a row.
            labels: int [B, S]: ``input_ids`` with -100 where nothing is predicted; shifted here,
                so that column s + 1 is predicted from column s. Labels of padding do not count.
            output_router_logits: give the router's logits, and add the load-balancing loss, times
                ``config.moe.router_aux_loss_coef``, to the loss.

        Raises:
            GenerationError: shapes that differ, or ids outside of the vocabulary.
        """
        ids_BS = token_ids(input_ids, self.config.vocab_size)
        check_length(self.config, ids_BS.shape[1], "input_ids")
        positions_BS = positions_of(beside(attention_mask, ids_BS, "attention_mask"), ids_BS.shape)
        ids = Tensor(np.where(positions_BS >= 0, ids_BS, 0).astype(np.int32))
        with pynative_mode(), self._router_logits(output_router_logits) as routers:
            hidden_TH, sums = self.model.hidden_states(ids, Tensor(positions_BS))
            logits_TV = output_logits(hidden_TH, self.model.head_weight())
            aux = None
            if output_router_logits and sums is not None:
                _check_pooled(self.config)
                aux = load_balancing_loss(sums, True)
            loss = None
            if labels is not None:
                given_BS = beside(labels, ids_BS, "labels")
                assert given_BS is not None
                check_labels(given_BS, self.config.vocab_size)
                targets = next_labels(given_BS, positions_BS)
                loss = _mean_nll(logits_TV, Tensor(targets.reshape(-1)))
                if aux is not None and self.config.moe is not None:
                    loss = loss + self.config.moe.router_aux_loss_coef * aux
        logits = logits_TV.reshape(*ids_BS.shape, -1)
        return CausalLMOutput(logits, loss, aux, tuple(routers) if aux is not None else None)

    def save_pretrained(
        self,
        path: str | Path,
        *,
        format: Literal["mistral_ms", "hf", "mistral", "peft"] = "mistral_ms",
    ) -> None:
        """Writes weights, configuration and the tokenizer's files; all of it, or nothing. Of a
        model with adapters these alone are written.

        Args:
            path: the directory, which must not be there.
            format: ``mistral_ms``; ``hf``, what transformers reads; or ``mistral``. Of adapters
                ``mistral_ms`` or ``peft``.

        Raises:
            CheckpointError: an unknown format, something at ``path``, a full disk.
        """
        files = self._files
        if not files and self.tokenizer is not None:
            files = dict(self.tokenizer.tokenizer.files)
        save_model(Path(path), self.config, self.model.stored_weights(), format, files)

    def load_adapter(self, path: str | Path) -> None:
        """Adds an adapter to the weights, for good: another one would be added to the sum.

        Args:
            path: its directory: PEFT's, or a checkpoint of a training here.

        Raises:
            CheckpointError: no adapter there, or tensors that the model has no matrices for.
            ConfigError: an adapter of another kind or of another model.
        """
        held = self.model.weights()

        def values(name: str) -> np.ndarray:
            return np.array(held[name].astype(ms.float32).asnumpy())

        base = self.config.model_copy(update={"lora": None})
        with open_adapter(Path(path), base) as adapter:
            for name, changed in merge_into(values, adapter):
                ops.assign(held[name], Tensor(changed).astype(held[name].dtype))

    def parameters(self) -> list[Parameter]:
        """The weights that are trained."""
        return list(self.model.trainable_params())

    def num_parameters(self) -> int:
        """Elements of all weights."""
        return sum(each.size for each in self.model.weights().values())

    @contextmanager
    def _router_logits(self, wanted: bool) -> Iterator[list[Tensor]]:
        """Keeps what the routers of a pass give, which only runs operator by operator."""
        found: list[Tensor] = []

        def keep(cell: nn.Cell, inputs: Any, output: Any) -> None:
            found.append(output[3])

        sparse = [layer for layer in self.model.layers if layer.sparse] if wanted else []
        handles = [layer.moe.router.register_forward_hook(keep) for layer in sparse]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


class MistralForCausalLM(PreTrainedModel):
    """A dense model; see the base."""


class MixtralForCausalLM(PreTrainedModel):
    """A model with sparse layers; see the base."""


class AutoModelForCausalLM:
    """Makes the model that a checkpoint or a configuration is of."""

    from_pretrained = PreTrainedModel.from_pretrained
    from_config = PreTrainedModel.from_config


def _class_of(config: ModelConfig) -> type[PreTrainedModel]:
    return MixtralForCausalLM if config.sparse_layers else MistralForCausalLM


def _check_pooled(config: ModelConfig) -> None:
    """Raises where there is no load-balancing loss of all layers."""
    if config.moe is not None and config.moe.layer_experts is not None:
        raise ConfigError(
            "impossible loss",
            where="output_router_logits",
            value=f"{list(config.expert_counts)} experts",
            rule="the load-balancing loss of this call takes means of each expert over all layers, "
            "which have different experts",
        )


def _mean_nll(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    nll_T, counted_T = token_nll(logits_TV, labels_T)
    return _sum(nll_T) / ops.maximum(_sum(counted_T), ops.ones((), ms.float32))
