"""``convert --run``: any checkpoint cut up for a layout, and whole again."""

import json

import numpy as np
import pytest
import yaml
from support.parts import MODEL
from typer.testing import CliRunner

from mistral_ms.checkpoint import open_checkpoint
from mistral_ms.cli import commands
from mistral_ms.cli.app import app
from mistral_ms.config import MoEArchitecture, load_run_config
from mistral_ms.errors import CheckpointError, ConfigError

SMALL = MODEL.model_copy(update={"moe": MoEArchitecture(num_local_experts=4)})


@pytest.fixture(scope="module", autouse=True)
def registered():
    if not app.registered_commands:
        commands.register(app)


@pytest.fixture
def hugging_face(tmp_path):
    """A checkpoint in their format, of random weights."""
    from mistral_ms.checkpoint import convert, our_shapes, save_native

    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(s, np.float32) for n, s in our_shapes(SMALL).items()}
    save_native(tmp_path / "ours", SMALL, [(n, a.shape, "float32", a) for n, a in arrays.items()])
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    return arrays


def run_file(tmp_path, **parallel):
    run = dict(
        model=SMALL.model_dump(mode="json"), parallel=parallel,
        data=dict(inputs=["x"], tokenizer="packaged-v1"),
        training=dict(
            max_steps=30, seq_length=8, global_batch_size=8, gradient_accumulation_steps=2
        ),
    )  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.mark.parametrize(
    "parallel",
    [
        dict(dp=4, ep=2),
        dict(dp=2, mp=2, pp=2, ep=2),
        dict(pp=4),
        dict(pp=2, pp_interleave_num=2),
    ],
    ids=str,
)
def test_cut_up_and_whole_again(tmp_path, hugging_face, parallel):
    config = run_file(tmp_path, **parallel)
    world = load_run_config(config).parallel.world
    done = CliRunner().invoke(
        app,
        ["convert", str(tmp_path / "hf"), str(tmp_path / "parts"), "--run", str(config),
         "--json", str(tmp_path / "r.json")],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "parts").glob("model-rank-*"))) == world
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["bytes"] == sum(array.nbytes for array in hugging_face.values())
    assert (result["source_kind"], result["tensors"]) == ("hf", len(hugging_face))
    with open_checkpoint(tmp_path / "parts") as source:
        for name, array in hugging_face.items():
            np.testing.assert_array_equal(source.read(name), array)


def test_each_stage_is_in_the_files_of_its_ranks(tmp_path, hugging_face):
    config = run_file(tmp_path, pp=2)
    CliRunner().invoke(
        app, ["convert", str(tmp_path / "hf"), str(tmp_path / "parts"), "--run", str(config)],
        catch_exceptions=False,
    )  # fmt: skip
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    files = {name: {p["file"] for p in part["pieces"]} for name, part in index["parts"].items()}
    assert files["embed_tokens.weight"] == {"model-rank-00000.safetensors"}
    assert files["layers.0.moe.experts.w1"] == {"model-rank-00000.safetensors"}
    assert files["layers.3.moe.experts.w1"] == {"model-rank-00001.safetensors"}
    assert files["lm_head.weight"] == {"model-rank-00001.safetensors"}


def test_what_is_refused(tmp_path, hugging_face):
    config = run_file(tmp_path, dp=2)
    paths = [str(tmp_path / "hf"), str(tmp_path / "parts"), "--run", str(config)]
    with pytest.raises(ConfigError, match="only our own format has parts"):
        CliRunner().invoke(app, ["convert", *paths, "--to", "hf"], catch_exceptions=False)
    (tmp_path / "parts").mkdir()
    with pytest.raises(CheckpointError, match="target exists"):
        CliRunner().invoke(app, ["convert", *paths], catch_exceptions=False)
