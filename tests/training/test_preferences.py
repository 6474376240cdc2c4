"""Learning from preferences: the formula and 20 steps against torch, and runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mindspore import Tensor, ops
from support.hf import save_one_layer
from support.lora import tiny_pair, training_config
from support.models import fill
from support.preferences import random_pairs, torch_logps, torch_loss

import mistral_ms
from mistral_ms.checkpoint import open_checkpoint
from mistral_ms.checkpoint.run_files import RunFiles
from mistral_ms.config import DROPLESS, DpoConfig, ParallelConfig, load_run_config, spelled_out
from mistral_ms.errors import ConfigError, DataError, TrainingError
from mistral_ms.models import CausalLM
from mistral_ms.models.preference import PreferenceLoss, RowNLL
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.training import TrainingRun, TrainStep, learning_rate, make_objective, read_metrics
from mistral_ms.training.identity import Identity
from mistral_ms.training.preferences import add_reference, open_preferences

LOSSES = {
    "sigmoid": DpoConfig(beta=0.3),
    "smoothed": DpoConfig(beta=0.3, label_smoothing=0.2),
    "ipo": DpoConfig(beta=0.3, loss_type="ipo"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_formula(name):
    """With its gradient: also at 0, where trainings begin, and where exp would overflow."""
    ratio_P2 = np.array([[0, 0], [1.5, -2], [-3, 0.5], [900, -900], [-900, 900]], np.float32)
    lengths_P2 = np.array([[3, 7], [1, 2], [4, 4], [5, 6], [6, 5]], np.float32)
    cell, dpo = PreferenceLoss(LOSSES[name]), LOSSES[name]
    value = cell(Tensor(ratio_P2), Tensor(lengths_P2)).asnumpy()
    gradient = ops.GradOperation()(cell)(Tensor(ratio_P2), Tensor(lengths_P2)).asnumpy()
    for pair in range(len(ratio_P2)):
        ratio = torch.tensor(ratio_P2[pair], requires_grad=True)
        loss = torch_loss(ratio, torch.tensor(lengths_P2[pair]), dpo)
        loss.backward()
        # MindSpore's exp is good to 6e-6
        np.testing.assert_allclose(value[pair], loss.item(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient[pair], ratio.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_rows_are_summed_alike_in_pieces():
    """Where all logits do not fit, each row by itself."""
    random = np.random.default_rng(0)
    hidden_TH = Tensor(random.standard_normal((12, 8)).astype(np.float32))
    weight_VH = Tensor(random.standard_normal((20, 8)).astype(np.float32))
    labels_BS = random.integers(0, 20, (3, 4)).astype(np.int32)
    labels_BS[1, :2] = -100
    whole = RowNLL(12)(hidden_TH, weight_VH, Tensor(labels_BS)).asnumpy()
    parts = RowNLL(3)(hidden_TH, weight_VH, Tensor(labels_BS)).asnumpy()
    logits = torch.tensor(hidden_TH.asnumpy()) @ torch.tensor(weight_VH.asnumpy()).T
    labels = torch.tensor(labels_BS).long()
    wanted = torch.nn.functional.cross_entropy(logits, labels.ravel(), reduction="none")
    np.testing.assert_allclose(whole, wanted.reshape(3, 4).sum(1).numpy(), rtol=1e-5)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)  # the same sums in another order


@pytest.mark.slow
def test_training_is_torchs(tmp_path):
    """Losses, gradient norms and rewards of 20 steps of whole weights, router loss included."""
    pair, config = tiny_pair("mixtral"), training_config()
    dpo = DpoConfig(beta=0.5, label_smoothing=0.1)
    data = random_pairs(10, 12, config.global_batch_size, vocab=64)
    model = CausalLM(pair.config, DROPLESS)
    fill(model, pair.weights())
    path = tmp_path / "pairs.npz"
    add_reference(model, config, data, path, ParallelContext(ParallelConfig()), lambda line: None)
    update = TrainStep(make_objective(model, config, dpo=dpo), config)
    results = [update(data.batch(step)) for step in range(config.max_steps)]

    adamw = torch.optim.AdamW(pair.hf.parameters(), betas=(0.9, 0.999), eps=1e-4, weight_decay=0.0)
    with torch.no_grad():
        reference, _ = torch_logps(pair.hf, data.read(np.arange(10, dtype=np.int32)))
    # sums of up to eleven logarithms, of about 4 each
    np.testing.assert_allclose(data.reference_P2.ravel(), reference.numpy(), rtol=1e-5)
    for step, result in enumerate(results):
        batch = data.batch(step)
        logps_B, aux = torch_logps(pair.hf, batch)
        ratio_B = logps_B - reference.reshape(-1, 2)[torch.tensor(batch.samples_B[::2])].ravel()
        lengths_B = torch.tensor((batch.labels_BS != -100).sum(-1))
        preference = torch_loss(ratio_B, lengths_B, dpo)
        loss = preference + config.router_aux_loss_coef * aux
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(pair.hf.parameters(), config.max_grad_norm).item()
        for group in adamw.param_groups:
            group["lr"] = learning_rate(config, step)
        adamw.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-5), step
        assert result.grad_norm == pytest.approx(norm, rel=1e-4), step
        nll = -logps_B.sum() / lengths_B.sum()
        assert result.lm_loss == pytest.approx(nll.item(), rel=1e-5)
        rewards_P2 = dpo.beta * ratio_B.detach().reshape(-1, 2).numpy()
        margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        wanted = {
            "loss": preference.item(),
            "rewards/chosen": rewards_P2[:, 0].mean(),
            "rewards/rejected": rewards_P2[:, 1].mean(),
            "rewards/margins": margins_P.mean(),
            "rewards/accuracies": (margins_P > 0).mean(),
            "logps/chosen": logps_B[0::2].mean().item(),
            "logps/rejected": logps_B[1::2].mean().item(),
        }
        if step == 0:  # differences of equal numbers: rounding decides which is larger
            assert result.preference["loss"] == pytest.approx(np.log(2), rel=1e-5)
            continue
        for name, value in wanted.items():
            assert result.preference[name] == pytest.approx(value, rel=1e-5, abs=2e-4), name
    assert results[-1].preference["rewards/margins"] > 1
    assert results[-1].preference["rewards/accuracies"] == 1


SHORT = [
    "training.global_batch_size=4",
    "training.gradient_accumulation_steps=2",
    "training.max_steps=4",
    "training.warmup_steps=0",
    "checkpoint.save_steps=2",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_one_layer(tmp_path_factory.mktemp("base") / "hf")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [
        {"prompt": f"Count to {n}:", "chosen": f" one, {n}", "rejected": f" no {n}"}
        for n in range(6)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def configured(base, text, *more):
    file = Path(mistral_ms.__file__).parents[1] / "configs" / "run" / "dpo_tiny.yaml"
    start = [f"init_from={base}", f"data.inputs=[{text}]", "training.seq_length=16"]
    return load_run_config(file, [*start, *SHORT, *more])


def prepared(run, output, resume=False):
    return TrainingRun(run, output, resume=resume, say=lambda line: None)


@pytest.fixture(scope="module")
def finished(base, text, tmp_path_factory):
    """The shipped run file, shortened: adapters."""
    run = prepared(configured(base, text), tmp_path_factory.mktemp("finished") / "out")
    return run.execute(), run


def tensors(checkpoint):
    with open_checkpoint(checkpoint, adapters=True) as source:
        return {name: source.read(name).tobytes() for name in source.names()}


@pytest.mark.slow
class TestRuns:
    def test_a_run_begins_at_the_reference(self, finished):
        result, run = finished
        records = read_metrics(result.files.metrics)
        first, last = records[0].preference, records[-1].preference
        assert first["loss"] == pytest.approx(np.log(2), rel=1e-5)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
        seen = run.data.reference_P2[run.data.batch(0).samples_B[::2]]
        assert first["logps/chosen"] == pytest.approx(seen[:, 0].mean(), rel=1e-5)
        assert last["loss"] < first["loss"] - 1e-3
        assert result.summary.preference == last

    def test_a_resumed_run_ends_with_the_same_bits(self, finished, base, text, tmp_path):
        """Without its pairs' file, and with the reference of the beginning."""
        result, _ = finished
        shutil.copytree(result.files.root, tmp_path / "out")
        shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000004")
        gone = text.rename(text.with_suffix(".gone"))
        try:
            again = prepared(configured(base, text), tmp_path / "out", resume=True).execute()
        finally:
            gone.rename(text)
        assert tensors(again.checkpoint) == tensors(result.checkpoint)
        found = [
            [(r.loss, r.preference) for r in read_metrics(each.files.metrics)]
            for each in (again, result)
        ]
        assert found[0] == found[1]

    def test_the_reference_of_an_adapter_to_go_on_with_is_the_base(
        self, finished, base, text, tmp_path
    ):
        result, before = finished
        start = f"init_from.adapter={result.files.adapter}"
        run = prepared(configured(base, text, start), tmp_path / "out")
        np.testing.assert_array_equal(run.data.reference_P2, before.data.reference_P2)
        result = run.update(run.data.batch(0))
        assert result.preference["loss"] < np.log(2) - 1e-3, "the adapter has learnt something"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.inputs=[other.jsonl]", r"data\.inputs: now \['.*other\.jsonl'\], in .*run\.yaml"),
        ("data.packing.add_eos=false", r"data\.packing: now {'add_eos': False}, in .*run\.yaml {}"),
    ],
)
def test_a_resume_with_other_data_is_refused(change, message, base, text, tmp_path):
    """They would not be read, and run.yaml would name them."""
    files = RunFiles(tmp_path)
    files.config.write_text(spelled_out(configured(base, text)))
    with pytest.raises(ConfigError, match=f"resume with other data: {message}"):
        open_preferences(configured(base, text, change), files, print, resuming=True)
    with pytest.raises(
        DataError, match=r"preferences\.npz"
    ):  # the same data pass, and are looked for
        open_preferences(configured(base, text), files, print, resuming=True)


def test_a_resume_with_another_loss_is_refused(base, text):
    """The strength of the same loss may change, and is reported."""

    def identity(*changes):
        run = configured(base, text, *changes)
        return Identity(run.model, run.routing, run.training, run.parallel, "pairs", run.dpo)

    state = identity().as_dict()
    with pytest.raises(TrainingError, match=r"another loss_type: dpo\.loss_type: now 'ipo'"):
        identity("dpo.loss_type=ipo").compare(state, "checkpoint")
    assert identity("dpo.beta=0.5").compare(state, "checkpoint") == [
        f"dpo.beta: {state['dpo']['beta']!r} before, 0.5 from here on"
    ]


REFUSED = {
    "preferences without a model: init_from": {"init_from": None},
    "impossible graph: dpo: .*execution=explicit": {"execution": "graph"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_runs_that_cannot_be_are_refused(message, base, text, tmp_path):
    run, change = configured(base, text, "lora=null"), REFUSED[message]
    if "execution" in change:
        change = {"parallel": run.parallel.model_copy(update=change)}
    with pytest.raises(ConfigError, match=message):
        prepared(run.model_copy(update=change), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("routing.policy=capacity", r"dpo needs routing\.policy dropless \(capacity\)"),
        ("parallel.mp=2", r"dpo needs parallel\.mp of 1 \(2\)"),
        ("distillation=elsewhere", "dpo and distillation do not go together"),
        ("data.packing.boundaries=ignore", r"data\.packing\.boundaries is of texts"),
        ("dpo.loss_type=hinge", "'sigmoid' or 'ipo'"),
        ("dpo.beta=1e-7", "greater than or equal to 0.000001"),
        ("dpo.beta=1e4", "less than or equal to 1000"),
        ("dpo.label_smoothing=0.5", "less than 0.5"),
        ("dpo={loss_type: ipo, label_smoothing: 0.1}", "label_smoothing .*is of loss_type sigmoid"),
    ],
)
def test_configurations_that_cannot_be_are_refused(change, message, base, text):
    with pytest.raises(ConfigError, match=message):
        configured(base, text, change)
