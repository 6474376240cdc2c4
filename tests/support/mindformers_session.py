"""What the tests look at, computed under MindFormers: one process, one import of it.

``python -m support.mindformers_session DIRECTORY``: the directory has the inputs (``base``: a
Hugging Face model, ``fused`` and ``gmm`` the same as MindFormers 1.x keeps it; the data;
``resumed``: a training of ours), and gets the results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np

CONFIGS = Path(__file__).parents[2] / "configs" / "mindformers"
TRAIN, PREDICT = CONFIGS / "finetune_mixtral_tiny.yaml", CONFIGS / "predict_mixtral_tiny.yaml"
STEPS, ROWS, LENGTH, TOTAL_STEPS = 20, 4, 16, 24
JUDGED = 5  # evaluated every so many steps
PROMPTS = [[1, 5, 6, 7, 9], [1, 300, 4], [1, 77]]
NEW_TOKENS = 6


def settings(path: Path, *flags: str) -> dict:
    from mistral_ms.mindformers import run

    return run.read_config(*run.parser().parse_known_args(["--config", str(path), *flags]))


def recorder():
    """A callback that keeps what MindFormers' own ones log."""
    from mindspore import Callback

    class Recorder(Callback):
        rows: ClassVar[list] = []
        evaluations: ClassVar[list] = []

        def on_train_step_end(self, run_context):
            found = run_context.original_args()
            loss, overflow, scale, rate, norm = (float(x.asnumpy()) for x in found.net_outputs)
            parts = found.train_network.losses()
            self.rows.append(
                dict(
                    loss=loss, overflow=overflow, scale=scale, rate=rate, norm=norm,
                    aux=parts.aux, lm=parts.lm, z=parts.z,
                    routed=parts.routed_LE.tolist(), kept=parts.kept_LE.tolist(),
                )
            )  # fmt: skip

        def on_eval_end(self, run_context):
            (found,) = run_context.original_args().metrics.values()
            self.evaluations.append(found)

    return Recorder


def trainings(place: Path, found: dict) -> None:
    from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
    from mindformers.trainer.base_trainer import BaseTrainer

    from mistral_ms.mindformers import run

    Recorder = recorder()
    MindFormerRegister.register_cls(Recorder, MindFormerModuleType.CALLBACK)

    def train(name: str, *flags: str) -> list:
        Recorder.rows = []
        config = settings(
            TRAIN,
            *("--train_data", str(place / "train.mindrecord"), "--output_dir", str(place / name)),
            # a process keeps what its first file says of it
            *("--context.postprocess_use_numpy", "True"),
            *("--num_samples", str(STEPS * ROWS), "--lr_schedule.total_steps", str(TOTAL_STEPS)),
            *("--callbacks.2.save_checkpoint_steps", str(STEPS)),
            *flags,
        )
        config["callbacks"].append({"type": "Recorder"})
        run.run(config)  # as under MindFormers' own launcher: it reads the checkpoint
        return Recorder.rows

    columns = "--train_dataset.input_columns", "[input_ids, labels]"
    found["trained"] = train("trained", "--load_checkpoint", str(place / "base"), *columns)
    judged = "--do_eval", "True", "--eval_dataset_dir", str(place / "eval.mindrecord")
    often = "--options", f"eval_step_interval={JUDGED}", "eval_epoch_interval=-1"
    evaluate = BaseTrainer._evaluate_in_training
    found["judged"] = []

    def kept(self, *args, **kwargs):
        (metric,) = evaluate(self, *args, **kwargs).values()
        found["judged"].append(metric["loss"])
        return {"PerplexityMetric": metric}

    BaseTrainer._evaluate_in_training = kept
    there = "--load_checkpoint", str(place / "resumed"), "--resume_training", "True"
    found["resumed"] = train("goes_on", *there, *judged, *often)
    config = settings(
        TRAIN,
        *("--run_mode", "eval", "--load_checkpoint", str(place / "fused")),
        *("--eval_dataset_dir", str(place / "eval.mindrecord"), "--output_dir", str(place / "e")),
        *("--gradient_accumulation_steps", "1"),
    )
    config["eval_callbacks"] = [{"type": "Recorder"}]
    run.prepare(config)
    run.run(config)
    found["evaluated"] = Recorder.evaluations[-1]


def classes(place: Path, found: dict) -> None:
    """Registry and Auto classes."""
    import mindspore as ms
    from mindformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from mistral_ms.mindformers import MistralConfig, MixtralForCausalLM

    base = str(place / "base")
    config = AutoConfig.from_pretrained(base)
    found["auto_config"] = [type(config).__name__, config.num_layers, config.n_kv_heads]
    model = AutoModelForCausalLM.from_pretrained(base, seq_length=LENGTH)
    ids = np.load(place / "ids.npy")
    logits = model(ms.Tensor(ids))[0].asnumpy()
    np.save(place / "logits.npy", logits)
    plain = model.generate(PROMPTS, max_new_tokens=NEW_TOKENS, do_sample=False)
    found["plain"] = [list(map(int, row)) for row in plain]
    made = AutoModelForCausalLM.from_config(config)
    found["from_config"] = [type(made).__name__, isinstance(model, MixtralForCausalLM)]
    dense = MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
        n_kv_heads=1, seq_length=8, sliding_window=None,
    )  # fmt: skip
    found["dense"] = type(AutoModel.from_config(dense)).__name__
    model.save_pretrained(place / "saved", to="hf")
    model.save_pretrained(place / "saved_ours")


def predictions(place: Path, found: dict) -> None:
    from mindformers.trainer import Trainer

    from mistral_ms.mindformers import run

    config = settings(
        PREDICT,
        *("--load_checkpoint", str(place / "gmm"), "--predict_data", "I love", "Hello"),
        *("--output_dir", str(place / "p")),
        *("--processor.tokenizer.vocab_file", str(place / "base" / "tokenizer.model")),
        *("--save_file", str(place / "p.txt")),
    )
    run.prepare(config)
    made: list = []
    build = Trainer.__init__

    def kept(self, *args, **kwargs):
        build(self, *args, **kwargs)
        made.append(self)

    Trainer.__init__ = kept
    found["text"] = [text for row in run.run(config) for text in row["text_generation_text"]]
    model = made[0].trainer.network

    def generated(**settings):
        rows = model.generate(PROMPTS, max_new_tokens=NEW_TOKENS, **settings)
        return [list(map(int, row)) for row in rows]

    found["cached"] = generated(do_sample=False)
    found["sampled"] = [
        generated(do_sample=True, top_k=8, top_p=0.9, temperature=2.0, seed=seed)
        for seed in (1, 1, 2)
    ]


def main(place: Path) -> None:
    import mindformers

    found: dict = {"version": mindformers.__version__}
    trainings(place, found)
    classes(place, found)
    predictions(place, found)
    (place / "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
