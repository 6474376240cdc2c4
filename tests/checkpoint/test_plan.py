"""A plan must use every source element and write every target element exactly once."""

from dataclasses import replace
from pathlib import Path

import pytest

from mistral_ms.checkpoint.keys import HF, MISTRAL
from mistral_ms.checkpoint.layout import Block, format_layout
from mistral_ms.checkpoint.plan import (
    Assembly,
    Piece,
    check_coverage,
    check_tensors,
    make_plan,
    target_dtype,
)
from mistral_ms.checkpoint.safetensors_file import TensorInfo
from mistral_ms.config import ModelConfig, MoEArchitecture
from mistral_ms.errors import CheckpointError

CONFIG = ModelConfig(
    vocab_size=5,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    moe=MoEArchitecture(num_local_experts=2),
)


def piece(source="s", source_start=0, target_start=0, size=4):
    return Piece(source, source_start, "plain", target_start, "plain", Block("b", None, (size,)))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([piece(size=8)], None),
        ([piece(), piece(source_start=4, target_start=4)], None),
        ([piece()], "target t: element 4"),
        ([piece(), piece(source_start=4, target_start=5)], "target t: element 4"),
        ([piece(), piece(source_start=4, target_start=3)], "target t: element 3"),
        ([piece(), piece(source_start=0, target_start=4)], "source s: element 0"),
        ([piece(), piece(source="other", target_start=4)], "broken plan: other: no such tensor"),
    ],
)
def test_gaps_overlaps_and_leftovers_are_refused(pieces, message):
    plan = [Assembly("t", (8,), tuple(pieces))]
    if message is None:
        check_coverage(plan, {"s": (8,)})
        return
    with pytest.raises(CheckpointError, match=message):
        check_coverage(plan, {"s": (8,)})


def test_a_source_tensor_that_nobody_uses_is_refused():
    plan = [Assembly("t", (8,), (piece(size=8),))]
    with pytest.raises(CheckpointError, match="source left: element 0: must be used exactly once"):
        check_coverage(plan, {"s": (8,), "left": (2, 2)})


def test_a_key_table_that_takes_one_tensor_twice_is_refused():
    twice = dict(HF)
    name = "layers.{layer}.moe.experts.w3"
    twice[name] = replace(HF[name], name=HF["layers.{layer}.moe.experts.w1"].name)
    with pytest.raises(CheckpointError, match=r"broken plan: source .*w1\.weight"):
        make_plan(format_layout(CONFIG, twice), format_layout(CONFIG))


def test_pieces_of_stacked_experts_follow_each_other():
    plan = {a.name: a for a in make_plan(format_layout(CONFIG, MISTRAL), format_layout(CONFIG))}
    experts = plan["layers.0.moe.experts.w2"]
    assert experts.shape == (2, 4, 6)
    assert [(p.source, p.source_start, p.target_start) for p in experts.pieces] == [
        ("layers.0.feed_forward.experts.0.w2.weight", 0, 0),
        ("layers.0.feed_forward.experts.1.w2.weight", 0, 24),
    ]
    query = plan["layers.0.attention.q_proj.weight"].pieces[0]
    assert (query.source_layout, query.target_layout, query.block.heads) == (
        "interleaved",
        "plain",
        2,
    )


def infos(**dtypes):
    return {name: TensorInfo((4,), dtype, Path("f")) for name, dtype in dtypes.items()}


def test_dtype_keep_takes_the_dtype_of_the_pieces_and_refuses_a_mixture():
    two = Assembly("t", (8,), (piece("a"), piece("b", target_start=4)))
    assert target_dtype(two, infos(a="BF16", b="BF16"), "keep") == "BF16"
    mixed = infos(a="BF16", b="F32")
    assert target_dtype(two, mixed, "fp16") == "F16"
    with pytest.raises(CheckpointError, match="mixed dtypes: t: a is BF16, b is F32"):
        target_dtype(two, mixed, "keep")
    with pytest.raises(CheckpointError, match="unknown dtype: dtype: 'int8'"):
        target_dtype(two, mixed, "int8")


def test_tensors_are_compared_with_the_configuration():
    expected = {"a": (4,), "b": (4,)}
    check_tensors(infos(a="F32", b="F32"), expected, "dir")
    with pytest.raises(CheckpointError, match=r"missing tensor: dir: b: .* 2 tensors, 1 are not"):
        check_tensors(infos(a="F32"), expected, "dir")
    with pytest.raises(CheckpointError, match=r"extra tensor: f: c: "):
        check_tensors(infos(a="F32", b="F32", c="F32"), expected, "dir")
    with pytest.raises(CheckpointError, match=r"missing tensor: .*1 unknown ones are \(c\)"):
        check_tensors(infos(a="F32", c="F32"), expected, "dir")
    with pytest.raises(CheckpointError, match=r"wrong shape: f: a: \[4\]: .*\[2, 2\]"):
        check_tensors(infos(a="F32", b="F32"), expected | {"a": (2, 2)}, "dir")
