"""One run: a model, how its tokens are routed, what it learns, and what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from mistral_ms.config.base import Frozen, validate
from mistral_ms.config.conventions import PACKAGED_TOKENIZER
from mistral_ms.config.data import DataSourceConfig, PackingConfig
from mistral_ms.config.evaluation import EvaluationConfig
from mistral_ms.config.lora import LoraConfig
from mistral_ms.config.model import ModelConfig
from mistral_ms.config.parallel import ParallelConfig
from mistral_ms.config.preference import DpoConfig
from mistral_ms.config.routing import RoutingConfig
from mistral_ms.config.run_files import read_run_file
from mistral_ms.config.training import TrainingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.reading import is_file


class CheckpointConfig(Frozen):
    """When a training is saved.

    Attributes:
        save_steps: steps between checkpoints; the last step is always saved. None: only that.
        save_total_limit: how many are kept; None keeps all.
    """

    save_steps: int | None = Field(default=None, ge=1)
    save_total_limit: int | None = Field(default=2, ge=1)


CheckpointFormat = Literal[
    "mindspore",
    "hf",
    "mistral",
    "mistral-dump",
    "mindformers",
    "mindformers-fused",
    "mindformers-gmm",
]


class InitFromConfig(Frozen):
    """The weights that a training starts with. A bare path stands for one without other keys.

    Attributes:
        path: directory of a checkpoint of any known format, or a file of MindFormers' weights.
        format: which format to read when the directory holds several.
        verify: compare a checkpoint of ours with its recorded digests while it is read.
        follow_links: links may lead out of the directory, or of the hub's cache that it lies in.
        adapter: directory of an adapter of this checkpoint. With ``lora`` training goes on with it,
            and both must say the same; without, the weights start with it merged.
    """

    path: Path
    format: CheckpointFormat | None = None
    verify: bool = True
    follow_links: bool = False
    adapter: Path | None = None

    @property
    def directory(self) -> Path:
        """Where the files beside the weights lie."""
        return self.path.parent if is_file(self.path) else self.path


class DistillationConfig(InitFromConfig):
    """A model that the training is held to, by its outputs on the data that is learnt; beside the
    keys of ``init_from``:

    Attributes:
        coefficient: of the distance, the mean over the predicted tokens of
            KL(that model || the one that is trained).
    """

    coefficient: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class RunConfig(Frozen):
    """A file of ``configs/run``.

    Attributes:
        model: the architecture. In the file: the path of a model file or of a checkpoint's
            directory, or the model's keys in place. Left out, it is that of ``init_from``.
        routing: the routing policy of the sparse layers.
        training: the training.
        parallel: how many processes share it, and how.
        data: what is learnt.
        init_from: the checkpoint whose weights the training starts with: its path, or a group of
            path, format, verify, follow_links and adapter. Without one the weights are drawn.
        lora: adapters, which are trained and saved while the weights of ``init_from`` are frozen;
            None: the weights themselves are trained.
        distillation: a model whose outputs the training is held to, so that what it knew is not
            forgotten: its path, or a group of path, coefficient, format, verify and follow_links.
        dpo: what is learnt are preferences: ``data.inputs`` are jsonl files of pairs of answers,
            ``training.global_batch_size`` counts pairs, and the model that ``init_from`` names,
            without adapters that are trained, is the reference; None: texts are learnt.
        checkpoint: when the training is saved.
        evaluation: held-out data that the training is judged by while it goes on; None: it is not.
        output: directory of all that the run writes; ``runs/NAME`` when not given, with the run
            file's name.
    """

    model: ModelConfig
    routing: RoutingConfig = RoutingConfig(policy="capacity")
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataSourceConfig | None = None
    init_from: InitFromConfig | None = None
    lora: LoraConfig | None = None
    distillation: DistillationConfig | None = None
    dpo: DpoConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig | None = None
    output: Path | None = None

    @property
    def looks_ahead(self) -> bool:
        """Whether in training later tokens decide which experts a token has."""
        moe = self.model.moe
        return moe is not None and (self.routing.policy == "experts_choose" or moe.gate.looks_ahead)

    @field_validator("init_from", "distillation", mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _adapters(self) -> RunConfig:
        """The model that is trained has the adapters."""
        lora, own = self.lora, self.model.lora
        if own is not None and own != lora:
            raise ValueError("model.lora: the adapters of a run are its key lora, beside model")
        if lora is None:
            return self
        if lora.lora_dropout > 0:
            raise ValueError(
                f"lora.lora_dropout ({lora.lora_dropout:g}) must be 0 in training here"
            )
        if lora.use_dora and self.parallel.mp > 1:
            raise ValueError(
                f"lora.use_dora needs parallel.mp of 1 ({self.parallel.mp}): the length of a row "
                "is of all its columns, of which tensor-parallel ranks have parts"
            )
        model = self.model.model_copy(update={"lora": lora})
        object.__setattr__(self, "model", model)  # as validators do: the data is frozen after them
        return self

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        self._check_domains()
        length, longest = self.training.seq_length, self.model.longest_sequence
        if length > longest:
            raise ValueError(
                f"training.seq_length ({length}) must not exceed "
                f"the model's positions: {self.model.length_rule}"
            )
        batch, groups = self.training.global_batch_size, self.training.gradient_accumulation_steps
        copies = self.parallel.micro_batch_interleave_num
        if batch % (self.parallel.dp * groups * copies):
            names, values = (
                "parallel.dp * training.gradient_accumulation_steps",
                f"{self.parallel.dp} * {groups}",
            )
            if copies > 1:
                names, values = (
                    f"{names} * parallel.micro_batch_interleave_num",
                    f"{values} * {copies}",
                )
            raise ValueError(f"{names} ({values}) must divide training.global_batch_size ({batch})")
        if self.model.moe is not None:
            rows = batch // (self.parallel.dp * groups * copies)
            rule = self.routing.broken_groups(rows, length)
            if rule is not None:
                raise ValueError(rule)
        if self.model.moe is not None and self.model.moe.layer_experts is not None:
            coefficient = self.training.router_aux_loss_coef
            if self.routing.aux_loss == "pooled" and coefficient > 0:
                raise ValueError(
                    "routing.aux_loss (pooled) takes means of each expert over all layers, which "
                    f"have different experts (model.moe.num_local_experts "
                    f"{list(self.model.expert_counts)}): set routing.aux_loss=per_layer"
                )
        self.parallel.check(self.model)
        moe = self.model.moe
        chosen_by_experts = self.routing.policy == "experts_choose"
        if self.looks_ahead and not self.routing.allow_future:
            assert moe is not None
            key, value = "model.moe.gate", moe.gate.name
            if chosen_by_experts:
                key, value = "routing.policy", self.routing.policy
            raise ValueError(
                f"{key} ({value}) lets later tokens decide which experts a token has, so its "
                "training is not that of a causal model. Set routing.allow_future=true to train "
                "it all the same; evaluation and generation let each token choose"
            )
        if (
            moe is not None
            and chosen_by_experts
            and self.routing.rescale_survivors != moe.norm_topk_prob
        ):
            raise ValueError(
                f"routing.rescale_survivors ({self.routing.rescale_survivors}) must equal "
                f"model.moe.norm_topk_prob ({moe.norm_topk_prob}) under routing.policy "
                "experts_choose: the one divides a token's weights by their sum in training, the "
                "other where tokens choose, as in generation. Set "
                f"routing.rescale_survivors={str(moe.norm_topk_prob).lower()}"
            )
        if (
            moe is not None
            and self.routing.policy == "capacity"
            and self.routing.rescale_survivors
            and not moe.norm_topk_prob
        ):
            raise ValueError(
                "routing.rescale_survivors (True) divides a token's weights by the sum of those "
                "that got a slot, model.moe.norm_topk_prob (False) leaves them as they are where "
                "nothing is dropped, as in generation. Set model.moe.norm_topk_prob=true: it "
                "changes nothing in training, and generation divides by the same sum"
            )
        if (
            moe is not None
            and not chosen_by_experts
            and moe.num_experts_per_tok == 1 < moe.num_local_experts
            and moe.norm_topk_prob
            and not self.training.constant_router_weight
        ):
            raise ValueError(
                "Top-1 routing with renormalised weights (model.moe.num_experts_per_tok 1, "
                "norm_topk_prob true) gives every expert the weight 1, whatever the router says: "
                "the language-model loss has no gradient for it. Set "
                "model.moe.norm_topk_prob=false, or training.constant_router_weight=true to train "
                "it by the router losses alone"
            )
        stages, chunks = self.parallel.pp, self.parallel.pp_interleave_num
        if chunks > 1 and groups % stages:
            raise ValueError(
                f"training.gradient_accumulation_steps ({groups}) must be a multiple of "
                f"parallel.pp ({stages}) where parallel.pp_interleave_num is {chunks}"
            )
        if chunks > 1 and self.model.num_hidden_layers < stages * chunks:
            raise ValueError(
                f"parallel.pp ({stages}) times parallel.pp_interleave_num ({chunks}) parts need as "
                f"many layers; model.num_hidden_layers is {self.model.num_hidden_layers}"
            )
        return self

    @model_validator(mode="after")
    def _preferences(self) -> RunConfig:
        if self.dpo is None:
            return self
        if self.routing.policy != "dropless" and self.model.moe is not None:
            raise ValueError(
                f"dpo needs routing.policy dropless ({self.routing.policy}): the log-probability "
                "of an answer must not depend on the other rows of its batch"
            )
        parallel = self.parallel
        for key in ("pp", "mp", "micro_batch_interleave_num"):
            if (value := getattr(parallel, key)) > 1:
                raise ValueError(f"dpo needs parallel.{key} of 1 ({value})")
        for key in ("distillation", "evaluation"):
            if getattr(self, key) is not None:
                raise ValueError(f"dpo and {key} do not go together: leave {key} out")
        if self.data is not None:
            if self.data.dataset is not None or self.data.domains:
                raise ValueError("dpo learns pairs of data.inputs, without data.dataset or domains")
            for key in ("boundaries", "split_lines", "drop_last", "format"):
                if getattr(self.data.packing, key) != getattr(PackingConfig(), key):
                    raise ValueError(f"data.packing.{key} is of texts, not of pairs for dpo")
        return self

    def _check_domains(self) -> None:
        """Data have domains where the gate must know them, and nowhere else."""
        known = 1 if self.model.moe is None else self.model.moe.gate.row_domains
        given = () if self.data is None else self.data.domains
        if self.data is not None and known > 1 and not given:
            raise ValueError(
                f"model.moe.gate routes by {known} domains: data.domains says which each of "
                "data.inputs is of"
            )
        if given and (known == 1 or not set(given) <= set(range(known))):
            raise ValueError(
                f"data.domains {list(given)}: the gate (model.moe.gate) knows "
                f"{f'0 to {known - 1}' if known > 1 else 'none'}: random_routed knows as many as "
                "model.moe.gate.domains says"
            )
        if known > 1 and self.evaluation is not None:
            raise ValueError(
                "evaluation is of models that know no domains: leave it out, and evaluate what "
                "the extract command makes of a checkpoint"
            )


def data_of(run: RunConfig) -> DataSourceConfig:
    """What a run is trained on.

    Raises:
        ConfigError: nothing is named.
    """
    if run.data is None:
        raise ConfigError(
            "nothing to learn", where="data", rule="name data.dataset, or data.inputs"
        )
    return run.data


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run file and the model file that it names, then applies overrides to both.

    Paths in the file are relative to it (``output`` apart, which is relative to the working
    directory); paths in overrides are relative to the working directory.

    Args:
        path: the run file.
        overrides: ``key.path=value`` items, such as ``training.max_steps=50`` and
            ``model.hidden_size=64``; ``model=FILE`` names another model and comes before the
            others, wherever it stands. Of ``training.max_steps`` and ``training.num_train_epochs``
            the one that is overridden wins.

    Raises:
        ConfigError: see :func:`~mistral_ms.config.load.read_yaml`,
            :func:`~mistral_ms.config.load.apply_overrides` and
            :func:`~mistral_ms.config.base.validate`.
    """
    return run_config(read_run_file(Path(path), overrides), path)


def run_config(values: Mapping[str, Any], path: Path) -> RunConfig:
    """The same of values that were read.

    Raises:
        ConfigError: see :func:`~mistral_ms.config.base.validate`; or they are of a prediction.
    """
    if "prediction" in values and "training" not in values:
        raise ConfigError(
            "not a training",
            where=path,
            rule="a file with prediction, and without training, is for generate and dryrun",
            todo="give train and plan a file with training",
        )
    return validate(RunConfig, values, str(path))


def spelled_out(run: RunConfig) -> str:
    """A run as the text of a file that means the same wherever it lies and is read."""
    values = run.model_dump(mode="json")
    del values["model"]["lora"]  # said beside the model
    paths = (("init_from", "path"), ("init_from", "adapter"), ("distillation", "path"))
    for group, key in (*paths, ("data", "dataset"), ("evaluation", "dataset")):
        if values.get(group) and values[group].get(key):
            values[group][key] = str(Path(values[group][key]).resolve())
    if evaluation := values.get("evaluation"):
        evaluation["inputs"] = [str(Path(name).resolve()) for name in evaluation["inputs"]]
    if data := values.get("data"):
        data["inputs"] = [str(Path(name).resolve()) for name in data["inputs"]]
        tokenizer = data.get("tokenizer")
        if tokenizer is not None and not tokenizer.startswith(PACKAGED_TOKENIZER):
            data["tokenizer"] = str(Path(tokenizer).resolve())
    text: str = yaml.safe_dump(values, sort_keys=False)
    return text
