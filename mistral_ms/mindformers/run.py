"""``python -m mistral_ms.mindformers.run``: MindFormers' launcher for installed packages.

The flags are those of its ``run_mindformer.py``, abbreviations included, and ``--a.b.c value``
changes any key of the file. Relative paths are relative to the working directory.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mistral_ms.config import ModelConfig
from mistral_ms.errors import ConfigError, MistralMsError
from mistral_ms.mindformers import require_mindformers, run_file

MODES = ("train", "finetune", "eval", "predict")
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _boolean_or_name(text: str) -> bool | str:
    return _boolean(text) if text.lower() in ("true", "false") else text


# flag -> what it is, and the keys that it sets; of several those whose sections are there
FLAGS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "mode": (int, ("context.mode",)),
    "device_id": (int, ("context.device_id",)),
    "device_target": (str, ("context.device_target",)),
    "run_mode": (str, ("run_mode",)),
    "do_eval": (_boolean, ("do_eval",)),
    "train_dataset_dir": (str, ("train_dataset.data_loader.dataset_dir",)),
    "eval_dataset_dir": (str, ("eval_dataset.data_loader.dataset_dir",)),
    "modal_type": (str, ("modal_type",)),
    "predict_batch_size": (int, ("predict_batch_size",)),
    "adapter_id": (str, ("adapter_id",)),
    "load_checkpoint": (str, ("load_checkpoint",)),
    "src_strategy_path_or_dir": (str, ("src_strategy_path_or_dir",)),
    "auto_trans_ckpt": (_boolean, ("auto_trans_ckpt",)),
    "transform_process_num": (int, ("transform_process_num",)),
    "only_save_strategy": (_boolean, ("only_save_strategy",)),
    "resume_training": (_boolean_or_name, ("resume_training",)),
    "strategy_load_checkpoint": (str, ("parallel.strategy_ckpt_load_file",)),
    "remote_save_url": (str, ("remote_save_url",)),
    "seed": (int, ("seed",)),
    "use_parallel": (_boolean, ("use_parallel",)),
    "profile": (_boolean, ("profile",)),
    "epochs": (int, ("runner_config.epochs",)),
    "batch_size": (int, ("runner_config.batch_size",)),
    "gradient_accumulation_steps": (int, ("runner_config.gradient_accumulation_steps",)),
    "sink_mode": (_boolean, ("runner_config.sink_mode",)),
    "num_samples": (
        int,
        ("train_dataset.data_loader.num_samples", "eval_dataset.data_loader.num_samples"),
    ),
    "output_dir": (str, ("output_dir",)),
    "do_sample": (_boolean, ("model.model_config.do_sample",)),
    "trust_remote_code": (_boolean, ("trust_remote_code",)),
}


def parser() -> ArgumentParser:
    """The flags; ``--train_data`` and the like are abbreviations."""
    found = ArgumentParser(prog="python -m mistral_ms.mindformers.run", description=__doc__)
    found.add_argument("--config", required=True, help="configuration file (YAML)")
    found.add_argument(
        "--model", choices=sorted(run_file.MODELS), help="sets the two lines that name the model"
    )
    found.add_argument("--predict_data", nargs="+", help="texts, or a file of them, one a line")
    found.add_argument("--options", nargs="+", default=[], help="KEY=VALUE, any key of the file")
    found.add_argument("--register_path", help="directory of further modules to register from")
    for flag, (kind, keys) in FLAGS.items():
        found.add_argument(f"--{flag}", type=kind, help=f"sets {', '.join(keys)}")
    return found


def overrides(rest: Sequence[str]) -> dict[str, Any]:
    """``--a.b.c value`` and ``--a.b.c=value`` as keys and values.

    Raises:
        ConfigError: something that is neither.
    """
    found: dict[str, Any] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or (not equals and not words):
            raise ConfigError(
                "unknown argument", where=word, rule="further arguments are --a.b.c value"
            )
        found[key] = _value(key, value if equals else words.pop(0))
    return found


def _value(key: str, text: str) -> Any:
    """What stands for a value: YAML; also numbers such as 1e-5, which YAML takes for a text.

    Raises:
        ConfigError: no YAML.
    """
    if _NUMBER.fullmatch(text):
        return float(text)
    try:
        return yaml.safe_load(text) if text else text
    except yaml.YAMLError as error:
        raise ConfigError("not a value", where=f"--{key}", value=text, rule=str(error)) from error


def read_config(arguments: Namespace, rest: Sequence[str]) -> dict[str, Any]:
    """The configuration file with everything that the command line changes, checked.

    Raises:
        ConfigError: see :func:`mistral_ms.mindformers.run_file.check`.
    """
    path = Path(arguments.config)
    config = run_file.read(path)
    for flag, (_, keys) in FLAGS.items():
        value = getattr(arguments, flag)
        for key in keys if value is not None else ():
            if len(keys) == 1 or run_file.get(config, key.rpartition(".")[0]) is not None:
                run_file.put(config, key, value)
    for option in arguments.options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError("unknown argument", where=option, rule="options are KEY=VALUE")
        run_file.put(config, key, _value(key, value))
    for key, value in overrides(rest).items():
        run_file.put(config, key, value)
    if arguments.model is not None:
        run_file.name_model(config, arguments.model)
    if config.get("run_mode") not in MODES:
        raise ConfigError(
            "unknown mode",
            where="run_mode",
            value=repr(config.get("run_mode")),
            rule=f"must be one of {', '.join(MODES)}",
        )
    if prompts := arguments.predict_data or config.get("input_data"):
        config["input_data"] = _texts([prompts] if isinstance(prompts, str) else prompts)
    if config["run_mode"] == "predict" and not config.get("input_data"):
        raise ConfigError("no prompts", where="input_data", todo="--predict_data TEXT [TEXT ...]")
    run_file.check(config, path)
    run_file.accumulate(config)
    return config


def _texts(given: Sequence[str]) -> list[str]:
    """Prompts, or the lines of one file of them."""
    if len(given) == 1 and Path(given[0]).is_file():
        lines = Path(given[0]).read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.strip()]
    return list(given)


def run(config: dict[str, Any]) -> Any:
    """Trains, evaluates or predicts as a checked configuration says; see MindFormers' Trainer."""
    from mindformers.core.context import build_context
    from mindformers.tools.register import MindFormerConfig
    from mindformers.trainer import Trainer

    from mistral_ms.mindformers import registration  # noqa: F401  (registers)
    from mistral_ms.mindformers.resume import lay_out

    mode = config["run_mode"]
    if mode == "predict":
        os.environ["RUN_MODE"] = "predict"  # what MindFormers' models are told by
    with tempfile.TemporaryDirectory() as place:
        # read by MindFormers from a file: only then does it fill in what is not stated
        path = Path(place) / "run.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        made = MindFormerConfig(str(path), run_mode=mode)
        if made.resume_training and not made.use_parallel:
            training = Path(place) / "training"
            training.mkdir()
            made.load_checkpoint = str(lay_out(Path(made.load_checkpoint), training))
            made.load_ckpt_format = "safetensors"
        build_context(made)
        if mode == "predict" and made.use_parallel and not run_file.is_divided(config):
            _deal(made)
        trainer = Trainer(args=made)
        checkpoint = made.load_checkpoint
        if mode == "eval":
            return trainer.evaluate(eval_checkpoint=checkpoint)
        if mode == "predict":
            return trainer.predict(
                predict_checkpoint=checkpoint,
                input_data=made.input_data,
                # our generator divides prompts itself; MindFormers wants whole batches of them
                batch_size=made.predict_batch_size or len(made.input_data),
            )
        return trainer.train()


def _deal(made: Any) -> None:
    """Leaves a process with a whole model the prompts of its turn, and a file of its own."""
    from mindspore.communication import get_group_size, get_rank

    rank = get_rank()
    made.input_data = made.input_data[rank :: get_group_size()]
    file = Path(made.save_file or "text_generation_result.txt")
    made.save_file = str(file.with_name(f"{file.stem}_{rank}{file.suffix}"))


def check_model(config: dict[str, Any]) -> ModelConfig:
    """The model of a run; everything that its configuration says of it is looked at.

    Raises:
        ConfigError: a value that is not supported, or a layout that cannot be.
    """
    from mistral_ms.mindformers import graph, registration

    keys = dict(run_file.get(config, "model.model_config"))
    made = getattr(registration, keys.pop("type"))
    keys.pop("auto_register", None)
    layout = {
        **(config.get("parallel_config") or {}),
        "recompute": config.get("recompute_config") or {},
    }
    described = made(parallel_config=layout, moe_config=config.get("moe_config"), **keys)
    model: ModelConfig = described.architecture()
    training = config["run_mode"] in ("train", "finetune")
    described.routing(training=training)
    described.router_loss_coefficients()
    if not run_file.is_divided(config):
        _ = described.weight_dtype, described.recompute
        return model
    parallel = (graph.run_of if training else graph.prediction_of)(described).parallel
    processes = os.environ.get("MS_WORKER_NUM")
    if processes is not None and parallel.world != int(processes):
        raise ConfigError(
            "wrong number of processes",
            where="parallel_config",
            value=f"{processes} processes",
            rule=f"data_parallel * model_parallel * pipeline_stage is {parallel.world}",
        )
    return model


def prepare(config: dict[str, Any]) -> None:
    """Checks the model of a run, see :func:`check_model`, its data, and the checkpoint that it
    begins with.

    Has a whole model read ``load_checkpoint`` itself, expert by expert, in whatever known format
    it is; MindFormers would make a second copy of all weights, and only log what is missing. The
    checkpoint is compared with the model before anything is built. MindFormers itself loads a
    training that goes on, and what processes load that divide one: they cut it by names and
    layouts.

    Args:
        config: of the run.

    Raises:
        CheckpointError: see :func:`~mistral_ms.checkpoint.open_checkpoint` and
            :func:`~mistral_ms.mindformers.resume.take_training`.
        ConfigError: a value that is not supported; no data; a checkpoint of another model.
        DataError: see :func:`~mistral_ms.mindformers.records.check_records`.
    """
    from mistral_ms.mindformers.records import check_records

    model = check_model(config)
    check_records(config)
    if not config.get("load_checkpoint"):
        return
    from mistral_ms.mindformers.resume import newest_of_rank, take_training
    from mistral_ms.mindformers.weights import check_for_ranks, open_same

    path = Path(config["load_checkpoint"])
    if run_file.is_divided(config) and config["run_mode"] != "predict":
        check_for_ranks(config, path, model)
    elif not config.get("resume_training"):
        if (found := newest_of_rank(path)) is not None:
            print(f"load_checkpoint: {found}, the newest of {path}")
            path = found
        open_same(path, model, verify=False).close()
        run_file.put(config, "model.model_config.weights_from", str(path.resolve()))
        config["load_checkpoint"], config["auto_trans_ckpt"] = "", False  # nothing is cut
    elif not config.get("use_parallel"):
        take_training(config, path, model)


def main(words: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        0 when it is done, 2 for bad input.
    """
    arguments, rest = parser().parse_known_args(words)
    try:
        require_mindformers()
        config = read_config(arguments, rest)
        if arguments.register_path is not None:
            os.environ["REGISTER_PATH"] = str(Path(arguments.register_path).resolve())
        prepare(config)
        run(config)
    except MistralMsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
