"""Training a model that a program holds, with the habits of Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from mistral_ms.auto.modeling import PreTrainedModel
from mistral_ms.checkpoint import CheckpointSeries, open_checkpoint
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.checkpoint.run_files import RunFiles
from mistral_ms.config import EvaluationConfig, Recompute, RunConfig
from mistral_ms.config.base import Frozen, in_our_words, validate
from mistral_ms.datasets import MindRecordSequences, RowSequences
from mistral_ms.errors import ConfigError, TrainingError
from mistral_ms.models import share_parameters
from mistral_ms.optimizers import find as find_optimizer
from mistral_ms.training import RunResult, StepRecord, TrainingRun
from mistral_ms.training.evaluate import Evaluation, Evaluator
from mistral_ms.training.held_out import EvaluationRecord

Rows = Iterable[Mapping[str, Any]]


class TrainingArguments(Frozen):
    """How a model is trained; names and defaults are those of Hugging Face where it has them.

    Attributes:
        output_dir: everything that the training writes.
        max_steps: updates; it wins over the epochs.
        num_train_epochs: passes over the data.
        per_device_train_batch_size: sequences of a micro-batch.
        gradient_accumulation_steps: micro-batches of an update.
        max_seq_length: longer rows are cut off; None: the longest row.
        learning_rate: the peak.
        lr_scheduler_type: ``linear`` and ``cosine`` fall to ``min_lr_ratio`` of the peak, which the
            last step reaches (in transformers the step after it would).
        warmup_steps: steps that rise linearly to the peak.
        min_lr_ratio: see there.
        optim: ``adamw``, ``sgd``, ``muon``, or another that is registered.
        optim_args: settings of the optimizer beside learning rate and weight decay.
        weight_decay: of matrices; vectors are not decayed.
        adam_beta1: of AdamW.
        adam_beta2: of AdamW.
        adam_epsilon: of AdamW.
        max_grad_norm: gradients are scaled down to this global norm; None leaves them alone.
        neftune_noise_alpha: noise on embedded tokens (arXiv:2310.05914); None: there is none.
        router_aux_loss_coef: of the load-balancing loss; None: the model's own.
        router_z_loss_coef: of the router z-loss.
        capacity_factor: slots of an expert in multiples of an even share; None: no expert is ever
            full, and no choice is dropped.
        recompute: what the backward pass computes again: ``none``, ``selective``, ``full``.
        offload_optimizer: ``host`` keeps the optimizer's state in host memory.
        seed: of the order of the rows.
        save_steps: steps between checkpoints; the last step is always saved.
        save_total_limit: how many are kept.
        eval_steps: steps between evaluations; None: none, unless ``eval_dataset`` is given, which
            is then evaluated at the end.
        per_device_eval_batch_size: sequences at a time.
        load_best_model_at_end: the model has the weights of the lowest evaluation loss afterwards.
        early_stopping_patience: evaluations in a row that may be no better.
    """

    output_dir: Path
    max_steps: int | None = Field(default=None, ge=1)
    num_train_epochs: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    per_device_train_batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    max_seq_length: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    optim: str = "adamw"
    optim_args: dict[str, Any] = Field(default_factory=dict)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    router_z_loss_coef: float = Field(default=0.0, ge=0)
    capacity_factor: float | None = Field(default=None, gt=0)
    recompute: Recompute = "none"
    offload_optimizer: Literal["none", "host"] = "none"
    seed: int = Field(default=42, ge=0)
    save_steps: int | None = Field(default=None, ge=1)
    save_total_limit: int | None = Field(default=2, ge=1)
    eval_steps: int | None = Field(default=None, ge=1)
    per_device_eval_batch_size: int = Field(default=8, ge=1)
    load_best_model_at_end: bool = False
    early_stopping_patience: int | None = Field(default=None, ge=1)

    def __init__(self, output_dir: str | Path, **settings: Any) -> None:
        """Raises a ConfigError for an unknown key or an impossible value."""
        try:
            super().__init__(**{"output_dir": output_dir, **settings})
        except ValidationError as error:
            raise in_our_words(type(self), error, type(self).__name__) from error


@dataclass
class TrainerState:
    """What callbacks are told, and may ask for.

    Attributes:
        max_steps: of the training.
        global_step: updates so far.
        record: the last step's; None before the first.
        evaluations: all on held-out data so far.
        should_training_stop: set it to end the training after this step.
    """

    max_steps: int
    global_step: int = 0
    record: StepRecord | None = None
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    should_training_stop: bool = False


class TrainerCallback:
    """What a training calls; override what you need."""

    def on_train_begin(self, trainer: Trainer, state: TrainerState) -> None:
        """Everything is ready; the first step compiles."""

    def on_step_end(self, trainer: Trainer, state: TrainerState) -> None:
        """An update is done."""

    def on_evaluate(self, trainer: Trainer, state: TrainerState) -> None:
        """The model was evaluated: ``state.evaluations[-1]``."""

    def on_save(self, trainer: Trainer, state: TrainerState) -> None:
        """A checkpoint is being written."""

    def on_train_end(self, trainer: Trainer, state: TrainerState) -> None:
        """The last checkpoint is written."""


class Trainer:
    """Trains a model in this process; the loop, checkpoints and files are those of ``train``.

    Args:
        model: is changed in place.
        args: how.
        train_dataset: rows with ``input_ids`` and perhaps ``labels`` and ``attention_mask``, which
            are read once and kept in memory; or the directory of a dataset of the ``data`` command.
        eval_dataset: likewise, held-out.
        callbacks: told what happens, in this order.
        say: told in a line each what is being done.

    Attributes:
        state: of the last call of :meth:`train`.

    Raises:
        DataError: rows that cannot be learnt from, or are not for this model.
        ConfigError: settings that contradict each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: Rows | str | Path,
        eval_dataset: Rows | str | Path | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        asked = args.eval_steps or args.load_best_model_at_end or args.early_stopping_patience
        if eval_dataset is None and asked:
            raise ConfigError(
                "nothing to evaluate on",
                where="TrainingArguments.eval_steps",
                rule="evaluation needs an eval_dataset",
            )
        if args.early_stopping_patience is not None and args.eval_steps is None:
            raise ConfigError(
                "no evaluation before the end",
                where="TrainingArguments.early_stopping_patience",
                value=args.early_stopping_patience,
                rule="it counts evaluations while the training goes on",
                todo="set eval_steps",
            )
        self.model, self.args, self.callbacks, self._say = model, args, tuple(callbacks), say
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.train_dataset = self._sequences(train_dataset, args.max_seq_length, batch)
        self.eval_dataset = None
        if eval_dataset is not None:
            length = args.max_seq_length
            self.eval_dataset = self._sequences(eval_dataset, length, 1)
        self.run_config = self._run_config(batch)
        self.state = TrainerState(self.run_config.training.last_step)
        self._evaluator: Evaluator | None = None

    def train(self, *, resume_from_checkpoint: bool = False) -> RunResult:
        """Trains to the last step, or until a signal or a callback ends it.

        Args:
            resume_from_checkpoint: go on from the newest checkpoint in ``output_dir``, bit by bit
                as if it had not been interrupted.

        Raises:
            TrainingError: a training in ``output_dir`` that is not to be resumed, or another one.
            NotFiniteError: a loss that is not finite; a checkpoint from before was written.
        """
        if not isinstance(resume_from_checkpoint, bool):
            raise ConfigError(
                "no path here",
                where="train: resume_from_checkpoint",
                value=resume_from_checkpoint,
                rule="True goes on from the newest checkpoint in output_dir",
                todo="for another one make a model of it by from_pretrained",
            )
        state = self.state = TrainerState(self.run_config.training.last_step)
        # capacity is of training alone: the model itself stays dropless
        trained = share_parameters(
            self.model.model,
            self.run_config.routing,
            positions=self.train_dataset.seq_length,
            dtype=self.model.dtype,
        )
        run = TrainingRun(
            self.run_config,
            self.args.output_dir,
            resume=resume_from_checkpoint,
            say=self._say,
            data=self.train_dataset,
            held_out=self.eval_dataset,
            model=trained,
        )
        if run.held_out is not None:
            state.evaluations += run.held_out.records
        self._tell("on_train_begin")

        def stepped(record: StepRecord) -> None:
            state.record, state.global_step = record, record.step
            self._tell("on_step_end")

        def evaluated(record: EvaluationRecord) -> None:
            state.evaluations.append(record)
            self._tell("on_evaluate")

        def phase(name: str) -> None:
            state.global_step = run.update.progress.step
            if name == "saving":
                self._tell("on_save")

        result = run.execute(
            [stepped],
            phase,
            on_evaluation=[evaluated],
            stop=lambda: state.should_training_stop,
        )
        if self.args.load_best_model_at_end:
            best = CheckpointSeries(RunFiles(self.args.output_dir).best).newest()
            if best is not None:
                with open_checkpoint(best.path, adapters=True) as source:
                    load_weights(source, self.model.model.stored_weights())
        self._tell("on_train_end")
        return result

    def evaluate(self) -> Evaluation:
        """Loss, perplexity and accuracy of the model on the held-out rows, dropless.

        Raises:
            TrainingError: there are none.
        """
        if self.eval_dataset is None:
            raise TrainingError(
                "nothing to evaluate on", where="Trainer", rule="give it an eval_dataset"
            )
        if self._evaluator is None:
            model = share_parameters(
                self.model.model, positions=self.eval_dataset.seq_length, dtype=self.model.dtype
            )
            size = self.args.per_device_eval_batch_size
            self._evaluator = Evaluator(model, self.eval_dataset, size)
        return self._evaluator()

    def save_model(self, path: str | Path, **settings: Any) -> None:
        """Writes the model; see :meth:`PreTrainedModel.save_pretrained`."""
        self.model.save_pretrained(path, **settings)

    def _tell(self, what: str) -> None:
        for callback in self.callbacks:
            getattr(callback, what)(self, self.state)

    def _sequences(
        self, rows: Rows | str | Path, length: int | None, batch_size: int
    ) -> RowSequences | MindRecordSequences:
        if isinstance(rows, str | Path):
            found = MindRecordSequences(Path(rows), batch_size, self.args.seed)
            if length not in (None, found.seq_length):
                raise ConfigError(
                    "sequences of another length",
                    where="TrainingArguments.max_seq_length",
                    value=length,
                    rule=f"the dataset {rows} has sequences of {found.seq_length} tokens",
                )
            inner = self.model.tokenizer
            found.check_model(self.model.config, None if inner is None else inner.tokenizer)
            return found
        made = RowSequences(rows, seq_length=length, batch_size=batch_size, seed=self.args.seed)
        made.check_model(self.model.config)
        return made

    def _run_config(self, batch: int) -> RunConfig:
        args, moe = self.args, self.model.config.moe
        known = find_optimizer(args.optim, "TrainingArguments.optim").settings.model_fields
        adam = {"adam_beta1", "adam_beta2", "adam_epsilon"} & set(known)
        optimizer = {
            "name": args.optim,
            "learning_rate": args.learning_rate,
            "weight_decay": args.weight_decay,
            **{key: getattr(args, key) for key in sorted(adam)},
            **args.optim_args,
        }
        coefficient = args.router_aux_loss_coef
        if coefficient is None:
            coefficient = 0.0 if moe is None else moe.router_aux_loss_coef
        length: dict[str, Any] = {"num_train_epochs": args.num_train_epochs}
        if args.max_steps is not None:
            length = {"max_steps": args.max_steps}
        training = {
            **length,
            "seq_length": self.train_dataset.seq_length,
            "global_batch_size": batch,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "dtype": self.model.dtype,
            "seed": args.seed,
            "router_aux_loss_coef": coefficient,
            "router_z_loss_coef": args.router_z_loss_coef,
            "max_grad_norm": args.max_grad_norm,
            "neftune_noise_alpha": args.neftune_noise_alpha,
            "optimizer": optimizer,
            "lr_scheduler_type": args.lr_scheduler_type,
            "warmup_steps": args.warmup_steps,
            "min_lr_ratio": args.min_lr_ratio,
            "offload_optimizer": args.offload_optimizer,
        }
        routing: dict[str, Any] = {"policy": "dropless"}
        if args.capacity_factor is not None:
            routing = {"policy": "capacity", "capacity_factor": args.capacity_factor}
        values = {
            "model": self.model.config,
            "lora": self.model.config.lora,
            "routing": routing,
            "training": training,
            "parallel": {"execution": "explicit", "recompute": args.recompute},
            "checkpoint": {
                "save_steps": args.save_steps,
                "save_total_limit": args.save_total_limit,
            },
        }
        run = validate(RunConfig, values, "TrainingArguments")
        counted = run.training.with_max_steps(self.train_dataset.sequences)
        evaluation = None
        if self.eval_dataset is not None:
            evaluation = EvaluationConfig(
                eval_steps=args.eval_steps or counted.last_step,
                batch_size=args.per_device_eval_batch_size,
                keep_best=args.load_best_model_at_end,
                early_stopping_patience=args.early_stopping_patience,
            )
        return run.model_copy(update={"training": counted, "evaluation": evaluation})
