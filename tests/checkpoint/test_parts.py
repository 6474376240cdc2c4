"""Checkpoints in parts: written in any layout, read in any other, and what can go wrong."""

import json
import shutil

import numpy as np
import pytest
from support.parts import KINDS, LAYOUTS, MODEL, held, parts_of, save, whole

from mistral_ms.checkpoint import (
    CheckpointSeries,
    convert,
    inspect,
    open_checkpoint,
    open_tensor_set,
    save_native,
)
from mistral_ms.checkpoint.parts_writer import Stamp, begin_parts, finish_parts, write_part
from mistral_ms.config.layout import Sizes
from mistral_ms.errors import CheckpointError
from mistral_ms.parallel.topology import Topology, weight_slice

WIDE = LAYOUTS["dp4 mp2 pp2 ep2"]


@pytest.fixture(scope="module")
def values():
    return whole(0)


@pytest.fixture(scope="module")
def written(tmp_path_factory, values):
    """The same training state, written in every layout; with a shared-out optimizer in one more."""
    root = tmp_path_factory.mktemp("layouts")
    for name, sizes in LAYOUTS.items():
        save(root / name, values, sizes)
    save(root / "zero1", values, WIDE, zero1=True)
    return root


def bits(array):
    return np.ascontiguousarray(array).view(np.uint32)


@pytest.mark.parametrize("wanted", LAYOUTS)
@pytest.mark.parametrize("stored", [*LAYOUTS, "zero1"])
def test_every_rank_of_every_layout_reads_its_part(written, values, stored, wanted):
    topology = Topology(LAYOUTS[wanted])
    with (
        open_checkpoint(written / stored) as source,
        open_tensor_set(written / stored, "optimizer") as states,
    ):
        assert set(states.names()) == set(values) - set(source.names())
        for rank in range(topology.sizes.world):
            for name, spec in held(topology, rank).items():
                assert source.shape(name) == spec.shape
                tensor_slice = weight_slice(spec, topology, rank)
                got = source.read_slice(name, tensor_slice)
                assert np.array_equal(bits(got), bits(values[name][tensor_slice])), name
                for state in (f"{kind}.{name}" for kind in KINDS):
                    got = states.read(state, tensor_slice)
                    assert np.array_equal(bits(got), bits(values[state][tensor_slice])), state


@pytest.mark.parametrize("stored", [*LAYOUTS, "zero1"])
def test_whole_tensors_are_read_as_ever(written, values, stored):
    with (
        open_checkpoint(written / stored) as source,
        open_tensor_set(written / stored, "optimizer") as states,
    ):
        for name in source.names():
            assert np.array_equal(bits(source.read(name)), bits(values[name]))
            rows = (1, min(3, source.shape(name)[0]))
            assert np.array_equal(source.read(name, rows=rows), values[name][slice(*rows)])
        for name in states.names():
            assert np.array_equal(bits(states.read(name)), bits(values[name]))


def test_bytes_do_not_grow_with_ranks(written, values):
    total = sum(array.nbytes for array in values.values())
    for name in LAYOUTS:
        files = list((written / name).glob("*.safetensors"))
        headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
        assert sum(path.stat().st_size for path in files) - headers == total
        assert sum(path.name.startswith("model-") for path in files) == LAYOUTS[name].world


@pytest.mark.parametrize("stored", ["dp4 ep2", "dp4 mp2 pp2 ep2"])
def test_conversion_and_inspection_read_it_as_any_other(written, values, tmp_path, stored):
    found = inspect(written / stored, verify=True)
    assert (found.ok, found.kind, found.checksums) == (True, "mistral_ms", "verified")
    assert f"parts of {LAYOUTS[stored].world} ranks" in found.layout
    plain = tmp_path / "plain"
    weights = {name: values[name] for name in values if not name.startswith("exp_avg")}
    save_native(plain, MODEL, [(n, a.shape, "float32", a) for n, a in weights.items()])
    for source, target in ((written / stored, "a"), (plain, "b")):
        convert(source, tmp_path / target, "mistral_ms", "bf16")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in (tmp_path / "b").iterdir()}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_window_in_another_dtype(written, values):
    tensor_slice = (slice(1, 3), slice(4, 9), slice(2, 16))
    name = "layers.2.moe.experts.w1"
    with open_checkpoint(written / "dp4 ep4") as source:
        got = source.read_slice(name, tensor_slice, "float16")
    np.testing.assert_array_equal(got, values[name][tensor_slice].astype(np.float16))


def test_a_window_reads_no_other_pieces(written, monkeypatch):
    """Of four ranks' expert files only the one that has the wanted expert is touched."""
    from mistral_ms.checkpoint import safetensors_file

    read = []
    original = safetensors_file.SafetensorsStore.read_into

    def counted(self, name, start, out):
        read.append(out.nbytes)
        original(self, name, start, out)

    monkeypatch.setattr(safetensors_file.SafetensorsStore, "read_into", counted)
    with open_checkpoint(written / "dp4 ep4") as source:
        source.read_slice("layers.0.moe.experts.w1", (slice(2, 3), slice(0, 20), slice(0, 16)))
    assert read == [20 * 16 * 4]


# what goes wrong while all write


@pytest.fixture
def series(tmp_path, values):
    """One with a sound checkpoint of step 1."""
    made = CheckpointSeries(tmp_path / "series", save_total_limit=2)
    save(made.path(1), values, WIDE)
    return made


def broken_save(series, spoil, **options):
    with pytest.raises(CheckpointError) as raised:
        save(series.path(2), whole(2), WIDE, 2, before_finish=spoil, **options)
    assert series.steps() == (1,)
    assert {path.name for path in series.directory.iterdir()} == {"step-00000001"}
    assert series.newest().step == 1
    return str(raised.value)


def test_a_truncated_file(series):
    def spoil(directory):
        path = directory / "optimizer-rank-00003.safetensors"
        path.write_bytes(path.read_bytes()[:-1])

    assert "truncated file" in (message := broken_save(series, spoil))
    assert "optimizer-rank-00003.safetensors" in message


def test_a_missing_file(series):
    message = broken_save(series, lambda d: (d / "model-rank-00005.safetensors").unlink())
    assert "missing file" in message and "model-rank-00005" in message


def test_a_rank_that_never_wrote(series):
    message = broken_save(series, lambda d: (d / "rank-00007.done").unlink(), wait_seconds=0.3)
    assert "a rank has not saved" in message and "nothing from rank 7" in message


def test_a_rank_that_failed(series, values):
    """It cannot hold its values in the dtype: its own error, and the first rank's."""
    topology, stamp = Topology(WIDE), Stamp(WIDE.world, str(WIDE), 2)

    def spoil(directory):
        parts = parts_of(values, topology, 6)
        for path in directory.glob("*rank-00006*"):
            path.unlink()
        bad = parts["model"][0]
        object.__setattr__(bad, "dtype", "float16")
        object.__setattr__(bad, "values", np.full(bad.box.size, 1e9, np.float32))
        with pytest.raises(CheckpointError, match="overflow"):
            write_part(directory, 6, stamp, parts)

    message = broken_save(series, spoil)
    assert "a rank could not save: rank 6: CheckpointError: overflow" in message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layout", "dp=16 mp=1 pp=1 ep=1", "layout: rank 4 says 'dp=16 mp=1 pp=1 ep=1'"),
        ("step", 1, "step: rank 4 says 1: rank 0 says 2"),
        ("world", 8, "world: rank 4 says 8: rank 0 says 16"),
    ],
)
def test_ranks_that_disagree(series, key, value, message):
    def spoil(directory):
        path = directory / "rank-00004.done"
        note = json.loads(path.read_text())
        note["stamp"][key] = value
        path.write_text(json.dumps(note))

    assert message in broken_save(series, spoil)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda size: [size[0] + 1, *size[1:]], "overlap"),
        (lambda size: [size[0] - 1, *size[1:]], "elements of"),
        (lambda size: [size[0] + 99, *size[1:]], "in model-rank-00004.safetensors of"),
    ],
)
def test_parts_that_do_not_tile(series, change, message):
    def spoil(directory):
        path = directory / "rank-00004.done"
        note = json.loads(path.read_text())
        parts = note["sets"]["model"]
        name = next(
            n for n, p in parts.items() if p["start"][0] == 0 < p["size"][0] < p["shape"][0]
        )
        parts[name]["size"] = change(parts[name]["size"])
        path.write_text(json.dumps(note))

    found = broken_save(series, spoil)
    assert found.startswith("parts that do not fit") and message in found


def test_a_rank_without_the_directory(tmp_path, values):
    stamp = Stamp(1, "x", 1)
    with pytest.raises(CheckpointError, match=r"rank 0 does not see it.*all machines share"):
        write_part(tmp_path / "step", 0, stamp, parts_of(values, Topology(LAYOUTS["one"]), 0))


def test_a_stage_that_nobody_wrote(tmp_path, values):
    sizes = Sizes(1, 1, 1, 1)
    path, stamp = tmp_path / "step", Stamp(1, str(sizes), 1)
    begun = begin_parts(path)
    write_part(begun.directory, 0, stamp, parts_of(values, Topology(LAYOUTS["pp2"]), 0))
    with pytest.raises(CheckpointError, match="missing tensor"):
        finish_parts(begun, stamp, MODEL, {})
    assert not list(tmp_path.iterdir())


def test_what_a_killed_save_left_is_cleaned(series, values):
    path = series.path(2)
    begun = begin_parts(path)
    write_part(
        begun.directory, 0, Stamp(WIDE.world, str(WIDE), 2), parts_of(values, Topology(WIDE), 0)
    )
    left = shutil.copytree(begun.directory, path.with_name(f".{path.name}.partial-00killed"))
    begun.discard()
    assert series.clean() == (left,)
    assert series.newest().step == 1
    save(path, values, WIDE, 2)
    assert series.newest().step == 2


def test_a_save_replaces_one_that_is_there(series):
    other = whole(9)
    save(series.path(1), other, LAYOUTS["mp2"])
    with open_checkpoint(series.path(1)) as source:
        assert np.array_equal(source.read("lm_head.weight"), other["lm_head.weight"])
    assert len(list(series.path(1).glob("model-rank-*"))) == 2


# what goes wrong afterwards


@pytest.fixture
def two(series):
    save(series.path(2), whole(2), WIDE, 2)
    return series


def passed_over(series):
    found = series.newest()
    assert found.step == 1
    (other,) = found.passed_over
    return other.reason


def test_a_flipped_byte(two):
    path = two.path(2) / "model-rank-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    assert "damaged: the bytes of model-rank-00003.safetensors" in passed_over(two)


def test_a_file_cut_short(two):
    path = two.path(2) / "model-rank-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert "truncated file" in passed_over(two)


def test_a_file_that_went_missing(two):
    (two.path(2) / "optimizer-rank-00000.safetensors").unlink()
    assert "missing file" in passed_over(two)


def test_a_file_of_another_step(two):
    name = "model-rank-00002.safetensors"
    shutil.copy(two.path(1) / name, two.path(2) / name)
    assert f"damaged: the bytes of {name}" in passed_over(two)


def test_a_file_too_many(two):
    name = "model-rank-00002.safetensors"
    shutil.copy(two.path(2) / name, two.path(2) / "model-rank-00099.safetensors")
    assert "extra shard" in passed_over(two)


@pytest.mark.parametrize("what", ["start", "size", "file", "shape", "dtype"])
def test_an_index_that_lies(written, tmp_path, what):
    """Without digests, as `generate` opens it."""
    path = tmp_path / "copy"
    shutil.copytree(written / "dp4 ep4", path)
    index = path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    entry = data["parts"]["layers.0.moe.experts.w1"]
    first, second = entry["pieces"][:2]
    if what == "shape":
        entry["shape"][0] += 1
    elif what == "dtype":
        entry["dtype"] = "F16"
    else:
        first[what], second[what] = (
            (second[what], first[what]) if what in ("start", "file") else ([2, 20, 16], [0, 20, 16])
        )
    if what == "start":
        second["start"] = [1, 0, 0]
    index.write_text(json.dumps(data))
    manifest = json.loads((path / "COMPLETE").read_text())
    manifest["files"][index.name]["size"] = index.stat().st_size
    (path / "COMPLETE").write_text(json.dumps(manifest))
    if what == "file":  # two equal parts that changed places: only the digest can tell
        assert not inspect(path, verify=True).ok
        return
    found = "wrong part" if what == "dtype" else "parts that do not fit"
    with pytest.raises(CheckpointError, match=found):
        open_checkpoint(path, verify=False)
