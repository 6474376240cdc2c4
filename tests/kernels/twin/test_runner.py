"""The runner around a kernel: definition, inference, tiling; what it refuses and passes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kernels.support.twin import RequestError, Twin, TwinError, from_bf16, op_type, to_bf16

from ascend_kernels import build_twin as builder

FOLDER = Path(__file__).parent / "operator"
NONE, TOO_MANY_BLOCKS, REFUSES, HALF_OF_THE_TILING, NO_SCHEDULE_MODE, OTHER_TYPE = range(6)
X = np.arange(16, dtype=np.float32)


@pytest.fixture(scope="module")
def twin(compiles):
    """A library with the one operator of ``operator/``."""
    header = FOLDER / "twin_lab_tiling.h"
    kernel = builder.kernel_unit("twin_lab", FOLDER / "twin_lab.cpp", header)
    host = builder.Unit(FOLDER / "twin_lab_host.cpp")
    units = [*builder.twin_units(), host, kernel]
    return Twin(builder.build_twin(units=units, strict=True))


def run(twin, x=X, defect=NONE, blocks=3, **inputs):
    attrs = {"factor": 2.5, "defect": defect}
    return twin.run("twin_lab", {"x": x, **inputs}, attrs, blocks=blocks)


def test_definition_inference_tiling_and_kernel_meet(twin):
    definition = twin.describe("twin_lab")
    assert [p.name for p in definition.inputs] == ["x", "bias"]
    assert [p.required for p in definition.inputs] == [True, False]
    assert definition.attrs == {"factor": "float", "defect": "int"}
    assert definition.socs == ("ascend910b",)
    attrs = {"factor": 2.5}
    assert twin.infer("twin_lab", {"x": X}, attrs) == [((16,), "float32")]
    result = run(twin)
    np.testing.assert_array_equal(result.outputs["y"], 2.5 * X)
    assert len(result.blocks) == 3
    assert [block["read_bytes"] for block in result.blocks] == [64, 0, 0]
    assert result.counters["sync_alls"] == 3


def test_an_optional_input_reaches_the_kernel_or_is_null(twin):
    assert not run(twin, bias=X).outputs["y"].any()
    assert run(twin, bias=None).outputs["y"].any()


def test_tiling_by_name(twin):
    tiling = twin.tile("twin_lab", {"x": X}, {"factor": 4}, blocks=5, ub_bytes=100000)
    assert tiling == {
        "block_dim": 5, "key": 5, "schedule_mode": 1, "workspace": 1024 + 64,
        "count": 16, "factor": 4, "wide": 100000, "list": [7, 8, 5],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (TOO_MANY_BLOCKS, "tiling asks for 4 blocks on 3 cores"),
        (REFUSES, "the tiling function refuses"),
        (OTHER_TYPE, "this combination of data types is not in the definition"),
    ],
)
def test_host_code_that_is_wrong(twin, defect, message):
    with pytest.raises(RequestError, match=f"TwinLab: {message}"):
        run(twin, defect=defect)


def test_tiling_data_that_the_kernel_does_not_expect(twin):
    with pytest.raises(TwinError, match="the tiling function wrote 16 bytes, the kernel reads 32"):
        run(twin, defect=HALF_OF_THE_TILING)


def test_sync_all_needs_blocks_that_start_together(twin):
    with pytest.raises(TwinError, match=r"calls SyncAll, but its tiling does not SetScheduleMode"):
        run(twin, defect=NO_SCHEDULE_MODE)


def test_requests_that_do_not_fit_the_definition(twin):
    with pytest.raises(RequestError, match="attribute factor is required"):
        twin.run("twin_lab", {"x": X}, {})
    with pytest.raises(RequestError, match="an attribute that the operator does not have"):
        twin.run("twin_lab", {"x": X}, {"factor": 1, "colour": 2})
    with pytest.raises(RequestError, match="input x is required"):
        twin.run("twin_lab", {"bias": X}, {"factor": 1})
    with pytest.raises(RequestError, match="this combination of data types"):
        run(twin, x=X.astype(np.float16))
    with pytest.raises(RequestError, match="this combination of data types"):
        run(twin, bias=X.astype(np.int32))
    with pytest.raises(RequestError, match="shape inference refuses"):
        run(twin, x=X.reshape(4, 4))
    with pytest.raises(RequestError, match="no operator Nobody"):
        twin.describe("nobody")


def test_a_budget_of_ub_is_what_the_device_has_less_what_cann_keeps(twin):
    x = np.zeros(1024, np.float32)
    twin.run("twin_lab", {"x": x}, {"factor": 1}, ub_bytes=8192 + 4096)
    with pytest.raises(TwinError, match="the buffers take 4096 bytes and the budget is 4064"):
        twin.run("twin_lab", {"x": x}, {"factor": 1}, ub_bytes=8192 + 4064)


def test_names_of_types_and_entry_points():
    names = {"moe_gating_top_k": "MoeGatingTopK", "moe_gating_top_k_grad": "MoeGatingTopKGrad"}
    assert {name: op_type(name) for name in names} == names


def test_bfloat16_travels_as_bits():
    values = np.float32([0, -0.0, 1, 1 + 2**-8, 1 + 3 * 2**-8, 3e38, np.inf, np.nan])
    back = from_bf16(to_bf16(values))
    np.testing.assert_array_equal(back[:3], values[:3])
    assert back[3] == 1
    assert back[4] == np.float32(1 + 2**-6)
    assert np.isinf(back[6])
    assert np.isnan(back[7])
