"""Runs that train adapters: what is trained, saved, resumed and left; what is refused."""

import json
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file
from support.hf import save_one_layer

import mistral_ms
from mistral_ms.checkpoint import convert, inspect, open_checkpoint, open_tensor_set
from mistral_ms.checkpoint.adapters import open_adapter
from mistral_ms.checkpoint.files import ADAPTER_MODEL
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.config import ParallelConfig, from_hf, load_run_config
from mistral_ms.config.quantization import Quantization
from mistral_ms.errors import CheckpointError, ConfigError
from mistral_ms.models import CausalLM
from mistral_ms.parallel.adapters import adapters_outside_graph
from mistral_ms.training import TrainingRun

SHORT = [
    "training.seq_length=8",
    "training.global_batch_size=4",
    "training.max_steps=4",
    "checkpoint.save_steps=2",
]
RUN_FILE = "configs/run/lora_tiny.yaml"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_one_layer(tmp_path_factory.mktemp("base") / "hf")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The tide turns twice a day, and nobody thanks it. " * 12)
    return path


def configured(base, text, *more):
    file = Path(mistral_ms.__file__).parents[1] / RUN_FILE
    return load_run_config(
        file,
        [f"init_from={base}", f"data.inputs=[{text}]", *SHORT, "checkpoint.save_steps=2", *more],
    )


def prepared(run, output, resume=False):
    said = []
    made = TrainingRun(run, output, resume=resume, say=said.append)
    made.said = said
    return made


@pytest.fixture(scope="module")
def finished(base, text, tmp_path_factory):
    """The shipped run file, shortened, with weights decomposed; and the base before and after."""
    output = tmp_path_factory.mktemp("finished") / "out"
    run = prepared(configured(base, text, "lora.use_dora=true"), output)
    return run.execute(), run


def tensors(checkpoint):
    base = open_checkpoint(checkpoint, adapters=True)
    with base:
        return {name: base.read(name) for name in base.names()}


@pytest.mark.slow
def test_checkpoints_hold_adapters_alone(finished, base):
    result, run = finished
    assert result.summary.finished
    assert result.summary.final_lm_loss != result.summary.first_lm_loss
    names = set(tensors(result.checkpoint))
    assert names
    assert all(".lora_" in name for name in names)
    with open_tensor_set(result.checkpoint, "optimizer") as state:
        assert set(state.names()) == {
            f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in names
        }
    with open_checkpoint(base) as source:  # what was trained beside it is as it was read
        for name, held in run.update.model.weights().items():
            if name not in names:
                np.testing.assert_array_equal(held.asnumpy(), source.read(name))


@pytest.mark.slow
def test_pefts_files_lie_in_the_run(finished, base, tmp_path):
    result, _ = finished
    path = result.files.adapter
    values = json.loads((path / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(base)
    assert values["use_dora"] is True
    found = load_file(path / "adapter_model.safetensors")
    trained = tensors(result.checkpoint)
    ours = trained["layers.0.moe.experts.w2_linear.lora_B"]
    theirs = "base_model.model.model.layers.0.block_sparse_moe.experts.3.w2.lora_B.weight"
    np.testing.assert_array_equal(found[theirs], ours[3])
    assert np.abs(ours).max() > 0, "B starts at zero"
    assert sum(v.size for v in found.values()) == sum(v.size for v in trained.values())
    convert(result.checkpoint, tmp_path / "peft", "peft")  # any checkpoint of it can be
    for name in ("adapter_model.safetensors", "generation_config.json"):
        assert (tmp_path / "peft" / name).read_bytes() == (path / name).read_bytes()
    with pytest.raises(CheckpointError, match="option of another conversion: dtype: bf16"):
        convert(result.checkpoint, tmp_path / "no", "peft", "bf16")
    seen = inspect(path)
    assert seen.ok, seen.problem
    assert seen.kind == "peft"
    assert "DoRA, r 8" in seen.layout


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(finished, base, text, tmp_path):
    result, _ = finished
    shutil.copytree(result.files.root, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000004")
    again = prepared(configured(base, text, "lora.use_dora=true"), tmp_path / "out", resume=True)
    assert again.update.progress.step == 2
    ended = again.execute()
    want = tensors(result.checkpoint)
    for name, values in tensors(ended.checkpoint).items():
        assert values.tobytes() == want[name].tobytes(), name


@pytest.mark.slow
def test_a_run_goes_on_with_an_adapter(finished, base, text, tmp_path):
    """Of another run, in either form; its sizes must be those that are asked for."""
    result, _ = finished
    for number, path in enumerate((result.checkpoint, result.files.adapter)):
        start = ["lora.use_dora=true", f"init_from.adapter={path}"]
        run = prepared(configured(base, text, *start), tmp_path / str(number))
        want = tensors(result.checkpoint)
        for name, held in run.update.held().items():
            np.testing.assert_array_equal(held.asnumpy(), want[name])
    for change in ("lora.r=4", "lora.lora_alpha=8", "lora.use_dora=false"):
        with pytest.raises(ConfigError, match="another adapter: lora: r"):
            prepared(configured(base, text, *start, change), tmp_path / "no")


@pytest.mark.slow
def test_the_graph_trains_adapters_alike(base, text, tmp_path):
    """It saves them alone, and goes on from there beside a base that it reads again."""
    changes = [
        "lora.target_modules=[q_proj, gate, w1, w2, w3]", "training.max_steps=2",
        "training.gradient_accumulation_steps=1", "checkpoint.save_steps=1",
    ]  # fmt: skip
    found = {}
    for way in ("explicit", "graph"):
        run = configured(base, text, *changes, f"parallel.execution={way}")
        result = prepared(run, tmp_path / way).execute()
        found[way] = tensors(result.checkpoint), load_file(result.files.adapter / ADAPTER_MODEL)
    for ours, theirs in zip(*found.values(), strict=True):
        assert set(ours) == set(theirs) and len(ours) in (10, 4 + 6 * 4)
        for name, values in ours.items():
            # the same operations; the first step is 5e-4 long
            np.testing.assert_allclose(theirs[name], values, atol=1e-7, err_msg=name)
    shutil.rmtree(result.checkpoint)
    again = prepared(run, tmp_path / "graph", resume=True).update
    assert again.progress.step == 1
    saved = tensors(result.checkpoint.with_name("step-00000001"))
    lies = again.storage
    assert {
        name: lies.from_parameter(name, each.asnumpy()).tobytes()
        for name, each in again.held().items()
    } == {name: values.tobytes() for name, values in saved.items()}
    with open_checkpoint(base) as source:
        for name in source.names():
            held = again.storage.from_parameter(name, again.weights()[name].asnumpy())
            np.testing.assert_array_equal(held, source.read(name))


@pytest.mark.slow
def test_a_quantised_base_stays_quantised(base, text, tmp_path):
    """Trained, saved, resumed and merged beside codes; on the graph its experts are weights."""
    quantised = tmp_path / "int8"
    convert(base, quantised, quantize=Quantization(weights="int8"))
    changes = ["training.max_steps=2", "checkpoint.save_steps=1"]
    run = prepared(configured(quantised, text, *changes), tmp_path / "out")
    assert any(line.endswith("and are computed so") for line in run.said)
    model = run.update.model
    codes = {n: p.asnumpy() for n, p in model.weights().items() if p.dtype == ms.int8}
    assert len(codes) == 3
    with open_checkpoint(base) as source:
        elements = sum(np.prod(source.shape(name)) for name in source.names())
    trained = sum(p.size for p in model.stored_weights().values())
    scales = sum(p.size for n, p in model.weights().items() if n.endswith("_scales"))
    in_codes = sum(each.size for each in codes.values())
    wanted = 4 * (elements - in_codes + scales + trained) + in_codes
    assert run.memory.device_weights == wanted
    result = run.execute()
    for name, values in codes.items():
        np.testing.assert_array_equal(model.weights()[name].asnumpy(), values)
    convert(quantised, tmp_path / "merged", "hf", "fp32", merge=result.files.adapter)
    ids = Tensor(np.arange(3, 15, dtype=np.int32).reshape(2, 6))
    places = Tensor(np.tile(np.arange(6, dtype=np.int32), (2, 1)))
    with open_checkpoint(tmp_path / "merged") as source:
        merged = CausalLM(source.config, run.run.routing, positions=8)
        load_weights(source, merged.weights())
    found, wanted = model(ids, places).asnumpy(), merged(ids, places).asnumpy()
    # sums of float32 in another order
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    shutil.rmtree(result.checkpoint)
    again = prepared(run.run, tmp_path / "out", resume=True).update
    saved = tensors(result.checkpoint.with_name("step-00000001"))
    assert {name: each.asnumpy().tobytes() for name, each in again.held().items()} == {
        name: values.tobytes() for name, values in saved.items()
    }
    assert again.model.weights()["layers.0.moe.experts.w2"].dtype == ms.int8
    changes += ["parallel.execution=graph", "lora.target_modules=[q_proj]"]
    changes += ["training.gradient_accumulation_steps=1"]
    other = prepared(configured(quantised, text, *changes), tmp_path / "graph")
    assert any("are dequantised while they are read" in line for line in other.said)


class TestRefused:
    def test_names_that_no_matrix_has(self, base, text, tmp_path):
        run = configured(base, text, "lora.target_modules=[q_proj, w4]")
        with pytest.raises(ConfigError, match=r"lora\.target_modules: w4"):
            prepared(run, tmp_path / "out")
        assert not list((tmp_path / "out").glob("dataset"))

    def test_in_the_graph(self, base, text, tmp_path):
        changes = "parallel.execution=graph", "lora.target_modules=[v_proj]", "lora.use_dora=true"
        run = configured(base, text, *changes)
        found = r"impossible graph: lora\.use_dora: True: .*execution=explicit"
        with pytest.raises(ConfigError, match=found):
            prepared(run, tmp_path / "out")

    def test_in_the_graph_with_divided_matrices(self, base, text):
        model = configured(base, text, "lora.target_modules=[v_proj]").model
        for mp, found in ((1, []), (2, ["lora"])):
            keys = [key for key, _, _ in adapters_outside_graph(model, ParallelConfig(mp=mp))]
            assert keys == found

    def test_no_base(self, base, text, tmp_path):
        run = configured(base, text).model_copy(update={"init_from": None})
        with pytest.raises(ConfigError, match="adapters without a base model: init_from"):
            prepared(run, tmp_path / "out")

    @pytest.mark.slow
    def test_a_checkpoint_of_adapters_is_no_model(self, finished):
        path = finished[0].checkpoint
        for message in (f"--adapter {path}", f"convert BASE NEW --merge {path}"):
            with pytest.raises(CheckpointError, match=message):
                open_checkpoint(path)
        assert inspect(path).ok
        assert "adapters alone" in inspect(path).layout

    @pytest.mark.slow
    def test_an_adapter_of_another_model(self, finished, base):
        config, _ = from_hf(json.loads((base / "config.json").read_text()))
        other = config.model_copy(update={"rope_theta": 5e5})
        with pytest.raises(ConfigError, match=r"another model: model\.rope_theta"):
            open_adapter(finished[0].checkpoint, other)
        with pytest.raises(CheckpointError, match="a whole model, not an adapter"):
            open_adapter(base, config)
        smaller = config.model_copy(
            update={"moe": config.moe.model_copy(update={"num_local_experts": 3})}
        )
        with pytest.raises(CheckpointError, match="extra tensor"):
            open_adapter(finished[0].files.adapter, smaller)
