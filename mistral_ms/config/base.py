"""What all configuration models share: frozen, no unknown keys, errors in our own words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from mistral_ms.config.names import nearest, perhaps
from mistral_ms.errors import ConfigError

Model = TypeVar("Model", bound="Frozen")
_LONGEST_VALUE = 200
"""Characters of a value in a message."""


class Frozen(BaseModel):
    """Immutable typed data; an unknown key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's ``true`` (and ``on``, ``yes``) would be taken for 1."""
        field = cls.model_fields.get(str(info.field_name))
        if isinstance(value, bool) and field is not None and not _takes_bool(field.annotation):
            raise ValueError("true and false are no values of this key")
        return value


def validate(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Builds ``model`` from ``values``; a violation becomes a ConfigError that names the key.

    Args:
        model: the configuration class.
        values: keys and values as read from a file or a command line.
        where: the file or the argument they came from, for the message.

    Raises:
        ConfigError: an unknown key, a wrong type, or a rule of the class that does not hold.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise in_our_words(model, error, where) from error


def in_our_words(model: type[Frozen], error: ValidationError, where: str) -> ConfigError:
    """The first violation that pydantic found.

    Args:
        model: the configuration class.
        error: of its validation.
        where: the file or the argument that the values came from.
    """
    first = error.errors()[0]
    key, found = ".".join(str(part) for part in first["loc"]), first.get("input")
    unknown = first["type"] == "extra_forbidden"
    known = _advice(model, first["loc"]) if unknown else None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":
        message = "must be a group of keys and values"
    return ConfigError(
        "unknown key" if unknown else "invalid configuration",
        where=f"{where}: {key}" if key else where,
        value=_shortened(repr(found)) if key and not isinstance(found, Mapping) else None,
        rule="no key is ignored" if unknown else message,
        todo=known or _near_value(first),
    )


def _shortened(text: str) -> str:
    """Values come from files and requests of others: a message does not repeat them at length."""
    return text if len(text) <= _LONGEST_VALUE else f"{text[:150]} ... {text[-40:]}"


def nested(model: type[Model], values: Mapping[str, Any]) -> Model:
    """The same for a group that another one's validator makes, which says where it lies.

    Raises:
        ValueError: names the key.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = f"known: {', '.join(sorted(model.model_fields))}"
            near = perhaps(key, model.model_fields)
            message = f"unknown key: {'; '.join(filter(None, [near, known]))}"
        raise ValueError(f"{key}: {message}" if key else message) from None


def _takes_bool(annotation: Any) -> bool:
    """Whether true and false are values of a type."""
    inner = get_args(annotation)
    return annotation in (bool, Any) or any(each is True or _takes_bool(each) for each in inner)


def _near_value(error: Mapping[str, Any]) -> str | None:
    """The nearest of the values that a key takes, where these are a few names."""
    if error["type"] != "literal_error" or not isinstance(error.get("input"), str):
        return None
    return perhaps(error["input"], re.findall(r"'([^']+)'", error["ctx"]["expected"]))


_OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "steps": ("max_steps", "save_steps"),
    "epochs": ("num_train_epochs",),
    "micro_batches": ("gradient_accumulation_steps",),
    "micro_batch_num": ("gradient_accumulation_steps",),
    "batch_size": ("global_batch_size",),
    "per_device_train_batch_size": ("global_batch_size",),
    "clip_norm": ("max_grad_norm",),
    "clip_grad": ("max_grad_norm",),
    "aux_coef": ("router_aux_loss_coef",),
    "z_coef": ("router_z_loss_coef",),
    "schedule": ("lr_scheduler_type", "pipeline_scheduler"),
    "rate": ("learning_rate", "lr_factor"),
    "lr": ("learning_rate", "lr_factor"),
    "beta1": ("adam_beta1",),
    "beta2": ("adam_beta2",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    "bf16": ("dtype",),
    "fp16": ("dtype",),
    "precision": ("dtype",),
    "every": ("save_steps",),
    "keep": ("save_total_limit",),
    "keep_last": ("save_total_limit",),
    "interleave": ("micro_batch_interleave_num",),
    "data_parallel": ("dp",),
    "model_parallel": ("mp",),
    "tp": ("mp",),
    "tensor_parallel": ("mp",),
    "tensor_model_parallel_size": ("mp",),
    "pipeline_stage": ("pp",),
    "pipeline_model_parallel_size": ("pp",),
    "expert_parallel": ("ep",),
    "expert_model_parallel_size": ("ep",),
    "zero": ("optimizer_parallel",),
    "zero_stage": ("optimizer_parallel",),
    "zero1": ("optimizer_parallel",),
    "use_distributed_optimizer": ("optimizer_parallel",),
    "capacity": ("capacity_factor",),
}
"""Keys of other programs, and what they are called here."""


def _advice(model: type[Frozen], path: tuple[int | str, ...]) -> str:
    """The nearest known key, if there is one, and all keys of the group that ``path`` ends in."""
    group, name = model, str(path[-1])
    for part in path[:-1]:
        field = group.model_fields.get(str(part))
        if field is not None:  # otherwise the number of an entry in a list
            group = next(_groups(field.annotation), group)
    known = f"known keys: {', '.join(sorted(group.model_fields))}"
    other = _OTHER_NAMES.get(name, ())
    siblings = [key for key in other if key in group.model_fields]
    elsewhere = [
        key
        for key in _all_keys(model)
        if key.rpartition(".")[2] in (name, *(() if siblings else other))
    ]
    siblings = siblings or list(filter(None, [nearest(name, group.model_fields)]))
    near = elsewhere or [".".join(map(str, (*path[:-1], key))) for key in siblings]
    return f"perhaps {' or '.join(near)}; {known}" if near else known


def _all_keys(model: type[Frozen]) -> Iterator[str]:
    """Every key below a model, with the groups it lies in."""
    for name, field in model.model_fields.items():
        yield name
        for group in _groups(field.annotation):
            yield from (f"{name}.{inner}" for inner in _all_keys(group))


def _groups(annotation: Any) -> Iterator[type[Frozen]]:
    """The groups of keys that a type allows: itself, or inside of unions, tuples and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, Frozen):
        yield annotation
    for inner in get_args(annotation):
        yield from _groups(inner)
