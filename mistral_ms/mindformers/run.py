"""``python -m mistral_ms.mindformers.run``: MindFormers' launcher for installed packages.

The flags are those of its ``run_mindformer.py``, abbreviations included, and ``--a.b.c value``
changes any key of the file. Relative paths are relative to the working directory.
"""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mistral_ms.errors import ConfigError, MistralMsError
from mistral_ms.mindformers import require_mindformers, run_file

MODES = ("train", "finetune", "eval", "predict")


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _boolean_or_name(text: str) -> bool | str:
    return _boolean(text) if text.lower() in ("true", "false") else text


# flag -> what it is, and the keys that it sets
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
    "strategy_load_checkpoint": (str, ("strategy_load_checkpoint",)),
    "remote_save_url": (str, ("remote_save_url",)),
    "seed": (int, ("seed",)),
    "use_parallel": (_boolean, ("use_parallel",)),
    "profile": (_boolean, ("profile",)),
    "epochs": (int, ("runner_config.epochs",)),
    "batch_size": (int, ("runner_config.batch_size",)),
    "gradient_accumulation_steps": (int, ("runner_config.gradient_accumulation_steps",)),
    "sink_mode": (_boolean, ("runner_config.sink_mode",)),
    "num_samples": (int, ("train_dataset.data_loader.num_samples",)),
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
    """``--a.b.c value`` and ``--a.b.c=value`` as keys and values; values are YAML.

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
        found[key] = yaml.safe_load(value if equals else words.pop(0))
    return found


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
            run_file.put(config, key, value)
    for option in arguments.options:
        key, _, value = option.partition("=")
        run_file.put(config, key, yaml.safe_load(value))
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
    if arguments.predict_data is not None:
        config["input_data"] = _texts(arguments.predict_data)
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

    mode = config["run_mode"]
    if mode == "predict":
        os.environ["RUN_MODE"] = "predict"  # what MindFormers' models are told by
    with tempfile.TemporaryDirectory() as place:
        # read by MindFormers from a file: only then does it fill in what is not stated
        path = Path(place) / "run.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        made = MindFormerConfig(str(path), run_mode=mode)
    build_context(made)
    trainer = Trainer(args=made)
    checkpoint = made.load_checkpoint
    if mode == "eval":
        return trainer.evaluate(eval_checkpoint=checkpoint)
    if mode == "predict":
        return trainer.predict(
            predict_checkpoint=checkpoint,
            input_data=made.input_data,
            # our generator divides prompts itself; MindFormers wants whole batches of them
            batch_size=made.predict_batch_size or len(config["input_data"]),
        )
    return trainer.train()


def take_weights(config: dict[str, Any]) -> None:
    """Has a whole model read ``load_checkpoint`` itself, expert by expert, in whatever known format
    it is; MindFormers would make a second copy of all weights, and only log what is missing. The
    checkpoint is compared with the model before anything is built. What MindFormers resumes is left
    to it, and what processes load that divide a training: they cut it by names and layouts.

    Raises:
        CheckpointError: see :func:`~mistral_ms.checkpoint.open_checkpoint`.
        ConfigError: it is of another model.
    """
    path = config.get("load_checkpoint")
    divided = run_file.is_divided(config)
    if not path or (config.get("resume_training") and not divided):
        return
    from mistral_ms.mindformers import registration
    from mistral_ms.mindformers.weights import check_for_ranks, open_same

    keys = dict(run_file.get(config, "model.model_config"))
    made = getattr(registration, keys.pop("type"))
    keys.pop("auto_register", None)
    model = made(moe_config=config.get("moe_config"), **keys).architecture()
    if divided and config["run_mode"] != "predict":
        check_for_ranks(config, Path(path), model)
        return
    open_same(Path(path), model, verify=False).close()
    run_file.put(config, "model.model_config.weights_from", str(Path(path).resolve()))
    config["load_checkpoint"], config["auto_trans_ckpt"] = "", False  # nothing is cut


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
        take_weights(config)
        run(config)
    except MistralMsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
