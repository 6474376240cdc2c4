"""The parts of many ranks, merged; the strategy files are as MindSpore describes them."""

import time

import mindspore as ms
import numpy as np
import psutil
import pytest
import yaml
from mindspore import Parameter, Tensor
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

from mistral_ms.checkpoint import convert
from mistral_ms.checkpoint.keys import MINDFORMERS
from mistral_ms.checkpoint.layout import format_layout
from mistral_ms.config import MoEArchitecture, to_mindformers
from mistral_ms.errors import CheckpointError

DIVIDED = {".ffn.": 0, "tok_embeddings": 0, ".wo.": 1}  # along which axis, over two ranks


def axis_of(name):
    return next((axis for part, axis in DIVIDED.items() if part in name), None)


def strategy(shapes):
    """What a rank writes of a graph of two ranks: which axis of each tensor is divided."""
    layout_map = ParallelStrategyMap(current_stage=0)
    item = layout_map.parallel_strategy_item.add(node_name="any")
    item.parallel_strategys.stage = 0
    item.parallel_strategys.parallel_strategy.add().dim.append(2)
    for name, shape in shapes.items():
        layouts = layout_map.parallel_layout_item.add(param_name=name).parallel_layouts
        layouts.dev_matrix.add().dim.append(2)
        divided = [0 if axis == axis_of(name) else -1 for axis in range(len(shape))]
        layouts.tensor_map.add().dim.extend(divided)
        layouts.param_split_shape.add()
        layouts.indices_offset.add()
        layouts.field = layouts.opt_weight_shard_step = layouts.opt_weight_shard_size = 0
    return layout_map.SerializeToString()


@pytest.fixture
def make(tmp_path, tiny_config):
    """The output of a run with two ranks: parts of two steps, and their strategy files."""
    changes = {"vocab_size": 14, "pad_token_id": 0, "moe": MoEArchitecture(num_local_experts=4)}
    config = tiny_config.model_copy(update=changes)
    shapes = format_layout(config, MINDFORMERS).shapes

    def maker(container):
        rng = np.random.default_rng(0)
        path = tmp_path / "output"
        (path / "strategy").mkdir(parents=True)
        for step in (9, 10):
            whole = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
            for rank in range(2):
                directory = path / "checkpoint" / f"rank_{rank}"
                directory.mkdir(parents=True, exist_ok=True)
                parts = {
                    n: a if axis_of(n) is None else np.split(a, 2, axis_of(n))[rank]
                    for n, a in whole.items()
                }
                saved = [
                    {"name": n, "data": Parameter(Tensor(a), name=n)} for n, a in parts.items()
                ]
                file = directory / f"mixtral_rank_{rank}-1_{step}.{container}"
                ms.save_checkpoint(
                    saved, str(file), append_dict={"step_num": step}, format=container
                )
                written = path / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt"
                written.write_bytes(strategy(shapes))
        yaml_file = path / "checkpoint" / "run.yaml"
        yaml_file.write_text(yaml.safe_dump(to_mindformers(config)))
        return path, whole

    return maker


@pytest.mark.parametrize("container", ["safetensors", "ckpt"])
def test_the_newest_step_of_all_ranks(tmp_path, make, container, monkeypatch):
    """On a machine whose memory is in use by others, for whom MindSpore would wait."""
    path, whole = make(container)
    used = psutil.virtual_memory()._replace(percent=90.0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: used)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits for memory"))
    with pytest.raises(CheckpointError, match=r"the parts of many ranks.*--strategy DIRECTORY"):
        convert(path / "checkpoint", tmp_path / "ours")
    result = convert(path / "checkpoint", tmp_path / "ours", strategy=path / "strategy")
    assert result.skipped == ("step_num",) * (container == "ckpt")
    convert(tmp_path / "ours", tmp_path / "back", "mindformers", container="ckpt")
    found = ms.load_checkpoint(str(tmp_path / "back" / "mindspore_model.ckpt"))
    assert found.keys() == whole.keys()
    assert all(np.array_equal(found[name].asnumpy(), whole[name]) for name in whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "ours", "output"]


def test_what_cannot_be_merged(tmp_path, make):
    path, _ = make("safetensors")
    parts, strategies = path / "checkpoint", path / "strategy"

    def refuse(message, source=parts, files=strategies):
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "ours", strategy=files)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["output"]

    refuse("no parts of ranks: .*/strategy/rank_0: ", source=strategies)
    refuse("no strategy files: .*/nowhere: .*output/strategy", files=path / "nowhere")
    damaged = path / "damaged.ckpt"
    damaged.write_bytes(b"x" * 99)
    refuse("the parts of the ranks cannot be merged: .*of the same run", files=damaged)
    (parts / "rank_1").rename(parts / "rank_2")
    refuse("no parts of ranks: .*/rank_1: ")
    (parts / "rank_2").rename(parts / "rank_1")
    for name in ("mixtral_rank_1-1_9.safetensors", "mixtral_rank_0-1_10.safetensors"):
        next(parts.glob(f"rank_*/{name}")).unlink()
    refuse("incomplete checkpoint: .*no step has a file of every rank")
    for number in range(2):
        (parts / "rank_1" / f"{number}.safetensors").write_bytes(b"")
    refuse(r"several checkpoints of one rank: .*rank_1: 0\.safetensors, 1\.safetensors")
