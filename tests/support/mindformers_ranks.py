"""A process of a data parallel training under MindFormers' Trainer, and then of a prediction; msrun
starts several.

``mindformers_ranks.py DIRECTORY``: the directory has ``base``, a Hugging Face model, and
``shared.mindrecord``; it gets what each rank saw. All is done by the command of our launcher, with
paths that are relative to the directory.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import yaml

from support import mindformers_session as session

STEPS, PROCESSES = 3, 2
TEXTS = "I love", "Hello"
SHARED = "--use_parallel", "True", "--parallel.parallel_mode", "0"


def main(place: Path) -> None:
    from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

    from mistral_ms.mindformers import run

    Recorder = session.recorder()
    MindFormerRegister.register_cls(Recorder, MindFormerModuleType.CALLBACK)
    os.chdir(place)
    rank = os.environ["RANK_ID"]
    values = yaml.safe_load(session.TRAIN.read_text(encoding="utf-8"))
    values["callbacks"].append({"type": "Recorder"})
    Path(f"run_{rank}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    code = run.main(
        [
            *("--config", f"run_{rank}.yaml", *SHARED),
            *("--train_data", "shared.mindrecord", "--output_dir", "shared"),
            *("--train_dataset.input_columns", "[input_ids, labels]"),
            *("--gradient_accumulation_steps", "1"),
            *("--lr_schedule.total_steps", str(session.TOTAL_STEPS)),
            *("--load_checkpoint", "base", "--callbacks.2.save_checkpoint_steps", str(STEPS)),
        ]
    )
    assert code == 0
    Path(f"rank_{rank}.json").write_text(json.dumps(Recorder.rows), encoding="utf-8")
    code = run.main(
        [
            *("--config", str(session.PREDICT), *SHARED, "--predict_data", *TEXTS),
            *("--load_checkpoint", "base", "--output_dir", "predicted", "--save_file", "said.txt"),
            *("--processor.tokenizer.vocab_file", "base/tokenizer.model"),
        ]
    )
    assert code == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
