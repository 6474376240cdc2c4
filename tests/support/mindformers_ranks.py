"""A process of a data parallel training under MindFormers' Trainer; msrun starts several.

``mindformers_ranks.py DIRECTORY``: the directory has ``base``, a Hugging Face model, and
``shared.mindrecord``; it gets what each rank saw.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from support import mindformers_session as session

STEPS, PROCESSES = 3, 2


def main(place: Path) -> None:
    from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

    from mistral_ms.mindformers import run

    Recorder = session.recorder()
    MindFormerRegister.register_cls(Recorder, MindFormerModuleType.CALLBACK)
    config = session.settings(
        session.TRAIN,
        *("--use_parallel", "True", "--parallel.parallel_mode", "0"),
        *("--train_data", str(place / "shared.mindrecord"), "--output_dir", str(place / "shared")),
        *("--train_dataset.input_columns", "[input_ids, labels]"),
        *("--gradient_accumulation_steps", "1"),
        *("--lr_schedule.total_steps", str(session.TOTAL_STEPS)),
        *("--load_checkpoint", str(place / "base")),
        *("--callbacks.2.save_checkpoint_steps", str(STEPS)),
    )
    config["callbacks"].append({"type": "Recorder"})
    run.take_weights(config)
    run.run(config)
    (place / f"rank_{os.environ['RANK_ID']}.json").write_text(json.dumps(Recorder.rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
