"""Products of rows sorted by expert: every implementation against a loop, forward and backward."""

from __future__ import annotations

import logging

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mistral_ms.errors import KernelError
from mistral_ms.ops import cann, cpu, reference, reference_cells, select
from mistral_ms.ops.cpu import library

E, R, I, O = 4, 11, 5, 7  # noqa: E741
SIZES = {
    "uneven": [3, 1, 5, 2],
    "rows beyond the last group": [3, 0, 4, 1],
    "one expert has all": [0, 0, 11, 0],
    "nobody has any": [0, 0, 0, 0],
    "below zero, and more than there is": [-2, 5, 100, 3],
}
needs_compiler = pytest.mark.skipif(cpu.why_missing() is not None, reason=str(cpu.why_missing()))
KERNELS = ["reference", pytest.param("cpu", marks=needs_compiler)]


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (R, I), (E, O, I), (R, O)
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def loop(x, w, dout, sizes):
    """Results and gradients in float64, row by row."""
    x, w, dout = (a.astype(np.float64) for a in (x, w, dout))
    y, dx, dw = np.zeros(dout.shape), np.zeros(x.shape), np.zeros(w.shape)
    experts = [e for e, size in enumerate(sizes) for _ in range(size)][: len(x)]
    for row, e in enumerate(experts):
        y[row], dx[row] = w[e] @ x[row], dout[row] @ w[e]
        dw[e] += np.outer(dout[row], x[row])
    return y, dx, dw


class Weighted(nn.Cell):
    """<y, dout>, so that the gradient of y is ``dout``; and y."""

    def __init__(self, product):
        super().__init__()
        self.product = product

    def construct(self, x, w, sizes, dout):
        y = self.product(x, w, sizes)
        return (y * dout).sum(), y


def check(product, dtype=np.float32, atol=3e-6):
    """Every case; one compilation in graph mode, because the shapes are the same."""
    x, w, dout = inputs(dtype)
    gradient = ms.value_and_grad(Weighted(product), (0, 1), has_aux=True)
    for name, sizes in SIZES.items():
        arguments = Tensor(x), Tensor(w), Tensor(np.array(sizes, np.int32)), Tensor(dout)
        (_, y), gradients = gradient(*arguments)
        found = [part.asnumpy() for part in (y, *gradients)]
        for ours, theirs in zip(found, loop(x, w, dout, sizes), strict=True):
            assert ours.dtype == dtype
            np.testing.assert_allclose(ours, theirs, atol=atol, err_msg=name)


@pytest.mark.parametrize("kernels", KERNELS)
def test_equals_the_loop(mode, kernels):
    # sums of up to eleven float32 products of size 1
    check(select.grouped_linear(kernels, "float32"))


@needs_compiler
def test_equals_the_loop_compiled_by_jit():
    """As engines compile their steps."""
    x, w, dout = inputs()
    sizes = SIZES["uneven"]
    product = select.grouped_linear("cpu", "float32")
    y = ms.jit(product.construct)(Tensor(x), Tensor(w), Tensor(np.array(sizes, np.int32)))
    np.testing.assert_allclose(y.asnumpy(), loop(x, w, dout, sizes)[0], atol=3e-6)


def test_half_precision():
    # eleven roundings of 5e-4 of sums of size 3
    check(select.grouped_linear("cpu", "float16"), np.float16, atol=2e-2)


def test_rows_beyond_the_last_group_do_not_matter():
    x, w, _ = inputs()
    sizes = Tensor(np.array([3, 0, 4, 1], np.int32))
    spoiled = x.copy()
    spoiled[8:] = np.nan
    for kernels in ("reference", "cpu"):
        product = select.grouped_linear(kernels, "float32")
        clean, dirty = (product(Tensor(rows), Tensor(w), sizes).numpy() for rows in (x, spoiled))
        np.testing.assert_array_equal(dirty, clean)


@needs_compiler
def test_the_same_bits_every_time_on_several_threads():
    """Large enough to be divided among threads, into unequal shares."""
    rng = np.random.default_rng(1)
    shapes, sizes = ((96, 259), (3, 193, 259), (96, 193)), [50, 3, 40]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    x, w, dout = map(Tensor, arrays)
    run = ms.value_and_grad(Weighted(cpu.GroupedLinear()), (0, 1), has_aux=True)
    seen = set()
    for _ in range(5):
        (_, y), gradients = run(x, w, Tensor(np.array(sizes, np.int32)), dout)
        found = [part.asnumpy() for part in (y, *gradients)]
        seen.add(tuple(part.tobytes() for part in found))
    assert len(seen) == 1
    for ours, theirs in zip(found, loop(*arrays, sizes), strict=True):
        # float32 sums of at most 259 products of size 1
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@needs_compiler
def test_shapes_that_do_not_fit_are_refused():
    x, w, _ = inputs()
    with pytest.raises(RuntimeError):
        cpu.GroupedLinear()(Tensor(x), Tensor(w), Tensor(np.array([3, 1], np.int32))).asnumpy()


class Products(nn.Cell):
    """In place of the primitive, which runs on Ascend only; as strict as its documentation."""

    def construct(self, x, w, *nothing_and_ends):
        ends, rows = nothing_and_ends[-1], x[0].shape[0]
        assert ends.dtype == ms.int64
        assert rows > 0
        assert len(ends) > 1
        assert int(ends[-1]) == rows
        sizes = ms.ops.diff(ms.ops.cat((Tensor([0], ms.int64), ends))).astype(ms.int32)
        return [reference.grouped_linear(x[0], w[0].transpose(0, 2, 1), sizes)]


def with_products(cell):
    cell.multiply.multiply = Products()
    return cell


def test_what_surrounds_the_primitive_of_cann_is_the_reference():
    check(with_products(cann.GroupedLinear()))


@pytest.mark.parametrize("experts", [E, 1])
@pytest.mark.parametrize("name", SIZES)
def test_experts_of_cann_are_three_products(name, experts):
    """Results and gradients; rows beyond the groups give zero, whatever stands there."""
    rng = np.random.default_rng(0)
    shapes = (R, I), *[(experts, I, 3)] * 3, (R, I)
    *given, dout = (Tensor(rng.normal(size=s).astype(np.float32)) for s in shapes)
    sizes = Tensor(np.array(SIZES[name][-experts:], np.int32))
    fused = with_products(cann.GroupedSwiGLU())
    fused.swiglu = reference_cells.ReferenceSwiGLU()
    composed = reference_cells.ComposedGroupedSwiGLU(
        reference_cells.ReferenceGroupedLinear(),
        reference_cells.ComposedPackedSwiGLU(fused.swiglu),
    )
    found = []
    for cell in (fused, composed):
        weighted = ms.grad(lambda *x, cell=cell: (cell(*x, sizes) * dout).sum(), (0, 1, 2, 3))
        found.append([part.asnumpy() for part in (cell(*given, sizes), *weighted(*given))])
    for ours, theirs in zip(*found, strict=True):
        # sums of a few float32 products of size 1
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


class Halves(nn.Cell):
    """In place of Swiglu."""

    def construct(self, both, axis):
        gate, up = ms.ops.split(both, both.shape[axis] // 2, axis)
        return reference.swiglu(gate, up)


@pytest.mark.parametrize(("rows", "keeps"), [(9, False), (9, True), (3, False)])
def test_padded_experts_of_cann_are_two_products(rows, keeps):
    """Results and gradients, against products one by one."""
    rng = np.random.default_rng(0)
    shapes = (2, rows, I), (2, I, 4), (2, I, 4), (2, rows, 4)
    *given, dout = (Tensor(rng.normal(size=s).astype(np.float32)) for s in shapes)
    fused = cann.BatchedSwiGLU(keeps)
    fused.gated.swiglu = Halves()
    composed = reference_cells.ComposedBatchedSwiGLU(reference_cells.ReferenceSwiGLU())
    joined, found = [], []
    fused.join = Noted(fused.join, joined)
    for cell in (fused, composed):
        weighted = ms.grad(lambda *x, cell=cell: (cell(*x) * dout).sum(), (0, 1, 2))
        found.append([part.asnumpy() for part in (cell(*given), *weighted(*given))])
    for ours, theirs in zip(*found, strict=True):
        # sums of a few float32 products of size 1
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert bool(joined) == (rows > I and not keeps)


class Noted(nn.Cell):
    def __init__(self, cell, calls):
        super().__init__()
        self.cell, self.calls = cell, calls

    def construct(self, *given):
        self.calls.append(given)
        return self.cell(*given)


class TestChoice:
    @pytest.fixture(autouse=True)
    def nothing_logged(self, monkeypatch):
        monkeypatch.setattr(select, "_logged", set())

    def made(self, caplog, kernels="cpu", dtype="float32"):
        with caplog.at_level(logging.INFO, logger="mistral_ms.ops.select"):
            cells = [select.grouped_linear(kernels, dtype) for _ in range(3)]
        return type(cells[0]), [record.message for record in caplog.records]

    @needs_compiler
    def test_on_a_cpu_the_operator(self, caplog):
        assert select.dense_kernels() == "cpu"
        assert self.made(caplog) == (cpu.GroupedLinear, ["grouped_linear: cpu"])

    def test_without_a_compiler_the_reference_and_one_line(self, caplog, monkeypatch):
        monkeypatch.setattr(library.shutil, "which", lambda name: None)
        monkeypatch.setattr(cpu, "why_missing", library.why_missing.__wrapped__)
        kind, messages = self.made(caplog)
        assert kind is reference_cells.ReferenceGroupedLinear
        assert len(messages) == 1
        assert messages[0].startswith("grouped_linear: reference (no C++ compiler: PATH: g++")

    def test_in_half_precision_the_reference(self, caplog):
        kind, messages = self.made(caplog, dtype="float16")
        assert kind is reference_cells.ReferenceGroupedLinear
        assert messages == [
            "grouped_linear: reference (the CPU's operator is for float32 and bfloat16)"
        ]

    def test_on_ascend_that_of_cann(self, caplog, monkeypatch):
        monkeypatch.setattr(select.custom, "on_ascend", lambda: True)
        assert select.dense_kernels() == "cann"
        assert self.made(caplog, "cann") == (cann.GroupedLinear, ["grouped_linear: cann"])


COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then cat "{folder}/version"; exit; fi
echo call >> "{folder}/calls"
if [ -e "{folder}/broken" ]; then echo "it is broken" >&2; exit 1; fi
for argument; do [ "$last" = -o ] && echo made > "$argument"; last=$argument; done
"""


class TestLibrary:
    @pytest.fixture(autouse=True)
    def stand_in(self, tmp_path, monkeypatch):
        """A compiler that takes no time, and a cache of its own."""
        self.folder = tmp_path
        (tmp_path / "version").write_text("g++ 12")
        tool = tmp_path / "g++"
        tool.write_text(COMPILER.format(folder=tmp_path))
        tool.chmod(0o755)
        monkeypatch.setattr(library.shutil, "which", lambda name: str(tool))
        monkeypatch.setattr(library, "cache_directory", lambda: tmp_path / "cache")

    def calls(self):
        log = self.folder / "calls"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def test_compiles_once_and_again_when_something_changes(self, monkeypatch, tmp_path):
        made = [library.library(), library.library()]
        assert self.calls() == 1
        (self.folder / "version").write_text("g++ 13")
        made.append(library.library())
        monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-g"))
        made.append(library.library())
        (tmp_path / "another.cc").write_text("// another")
        monkeypatch.setattr(library, "FOLDER", tmp_path)
        made.append(library.library())
        assert self.calls() == 4
        assert len(set(made)) == 4
        assert all(path.read_text() == "made\n" for path in made)
        assert not list((self.folder / "cache").rglob("*.part"))

    def test_a_failure_says_what_the_compiler_said(self):
        (self.folder / "broken").write_text("")
        with pytest.raises(KernelError, match=r"compilation failed: .*ops/cpu.*broken"):
            library.library()
        (self.folder / "broken").unlink()
        assert library.library().exists()

    def test_a_cache_that_cannot_be_written_is_done_without(self):
        (self.folder / "cache").write_text("a file")
        made = library.library()
        assert made.exists()
        assert self.folder not in made.parents

    def test_a_mindspore_without_one_dnn_is_told(self, monkeypatch):
        monkeypatch.setattr(library, "ONE_DNN", ("libnothing.so.1",))
        with pytest.raises(KernelError, match="no oneDNN: MindSpore"):
            library.library()
