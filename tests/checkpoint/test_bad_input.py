"""Every kind of bad source has its own message, and leaves nothing behind."""

import json
import shutil
import struct
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral_ms.checkpoint import convert, open_checkpoint
from mistral_ms.errors import CheckpointError, MissingExtraError

NESTED = '{"weight_map":' + "[" * 100_000  # deeper than Python's parser goes


def refuse(source, message, **options):
    """Opening and converting must both fail with the message; the directory stays as it was."""
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source, **options)
    before = sorted(p.name for p in source.parent.iterdir())
    with pytest.raises(CheckpointError, match=message):
        convert(source, source.parent / "out", **options)
    assert sorted(p.name for p in source.parent.iterdir()) == before


def edit_json(path, **changes):
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | changes))
    return data


def edit_index(directory, change):
    path = directory / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    change(data["weight_map"])
    path.write_text(json.dumps(data))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, foreign):
    """One sharded and one single HF checkpoint, one of Mistral; copied for every test."""
    root = tmp_path_factory.mktemp("prepared")
    foreign.hf(root / "sharded", "mixtral", max_shard_size="40KB")
    foreign.hf(root / "single", "mistral")
    foreign.hf(root / "tied", "tied")
    foreign.bin(root / "bin", "mistral")
    foreign.mistral(root / "mistral", "mistral")
    foreign.dump(root / "dump")
    return root


@pytest.fixture
def source(tmp_path, prepared, request):
    return shutil.copytree(prepared / request.param, tmp_path / "src")


on = pytest.mark.parametrize
sharded = on("source", ["sharded"], indirect=True)
single = on("source", ["single"], indirect=True)


@sharded
def test_missing_shard(source):
    (source / "model-00002-of-00008.safetensors").unlink()
    refuse(source, r"missing file: .*model-00002-of-00008\.safetensors: .*index\.json names it")


@sharded
def test_truncated_shard(source):
    shard = source / "model-00003-of-00008.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    refuse(source, r"truncated file: .*model-00003-of-00008\.safetensors: \d+ bytes")


@sharded
def test_header_that_lies_about_offsets(source):
    shard = source / "model-00001-of-00008.safetensors"
    raw = shard.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    first, second = [k for k in header if k != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode().ljust(length)
    shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    refuse(source, r"damaged header: .*model-00001-of-00008\.safetensors: ")


@sharded
@on("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 5])
def test_index_that_names_a_path(source, name):
    outside = source.parent / "secret.safetensors"
    shutil.copy(source / "model-00001-of-00008.safetensors", outside)
    edit_index(source, lambda m: m.update({"model.norm.weight": name}))
    message = "damaged index" if name == 5 else r"file outside the checkpoint: .*index\.json: "
    refuse(source, message)


@sharded
def test_link_that_leads_outside(source):
    shard = source / "model-00001-of-00008.safetensors"
    shard.rename(source.parent / "elsewhere")
    shard.symlink_to(source.parent / "elsewhere")
    refuse(source, r"file outside the checkpoint: .*leads to .*elsewhere")


@single
def test_single_file_that_is_a_link_outside(source):
    (source / "model.safetensors").rename(source.parent / "elsewhere")
    (source / "model.safetensors").symlink_to(source.parent / "elsewhere")
    refuse(source, r"file outside the checkpoint: .*leads to .*elsewhere")


@single
@on("name", ["tokenizer.model", "tokenizer.model.v3", "generation_config.json"])
def test_side_file_that_is_a_link_outside(source, name):
    (source.parent / "secret").write_text("would be published with the converted checkpoint")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(source.parent / "secret")
    refuse(source, rf"file outside the checkpoint: .*src: '{name}' leads to .*secret")


@single
def test_side_file_that_is_larger_than_any_tokenizer(source):
    with (source / "generation_config.json").open("wb") as file:
        file.truncate(500 << 20)
    refuse(source, r"file too large: .*generation_config\.json: 524288000 bytes: at most 41943040")


@single
def test_side_file_that_is_a_link_to_its_neighbour(source):
    (source / "tokenizer.model.v3").write_text("pieces")
    (source / "tokenizer.model").symlink_to("tokenizer.model.v3")
    convert(source, source.parent / "out")
    assert (source.parent / "out" / "tokenizer.model").read_text() == "pieces"


@sharded
def test_links_of_the_hub_cache_are_followed(source, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (source / "tokenizer.model").write_text("pieces")
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    with open_checkpoint(snapshot) as opened:
        assert opened.kind == "hf"
        assert snapshot / "tokenizer.model" in opened.side_files


@sharded
def test_index_that_lists_a_tensor_the_shard_lacks(source):
    def move(weight_map):
        weight_map["model.norm.weight"] = "model-00001-of-00008.safetensors"

    edit_index(source, move)
    refuse(source, r"missing tensor: .*model-00001-of-00008.*: model\.norm\.weight: .*says it is")


@sharded
def test_shard_that_holds_a_tensor_the_index_lacks(source):
    edit_index(source, lambda m: m.pop("model.norm.weight"))
    refuse(source, r"extra tensor: .*safetensors: model\.norm\.weight: .*does not list it")


@sharded
def test_shard_that_the_index_does_not_name(source):
    shutil.copy(
        source / "model-00001-of-00008.safetensors", source / "model-00009-of-00009.safetensors"
    )
    refuse(source, r"extra shard: .*model-00009-of-00009\.safetensors: .* does not name it")


@sharded
def test_shards_without_an_index(source):
    (source / "model.safetensors.index.json").unlink()
    refuse(source, "missing index: .*shards need their")


@sharded
@on("text", ["{", "[]", '{"weight_map": 3}', NESTED], ids=["cut", "list", "number", "nested"])
def test_damaged_index(source, text):
    (source / "model.safetensors.index.json").write_text(text)
    refuse(source, r"(damaged index|not JSON).*model\.safetensors\.index\.json")


@single
def test_missing_tensor(source):
    state = load_file(source / "model.safetensors")
    del state["model.layers.1.self_attn.o_proj.weight"]
    save_file(state, source / "model.safetensors")
    refuse(source, r"missing tensor: .*src: model\.layers\.1\.self_attn\.o_proj\.weight: ")


@single
def test_extra_tensor(source):
    state = load_file(source / "model.safetensors")
    state["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(state, source / "model.safetensors")
    refuse(source, r"extra tensor: .*model\.safetensors: model\.layers\.1\.self_attn\.q_proj\.bias")


@single
@on("shape", [(32, 48), (48 * 32,), (48, 32, 1), (48, 31)])
def test_wrong_shape(source, shape):
    state = load_file(source / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(shape)
    save_file(state, source / "model.safetensors")
    refuse(source, r"wrong shape: .*up_proj\.weight: \[.*the configuration asks for \[48, 32\]")


@single
@on("change", [{"model_type": "llama"}, {"model_type": None}, {"model_type": "glm4_moe"}])
def test_unsupported_architecture_says_which_are_supported(source, change):
    edit_json(source / "config.json", **change)
    refuse(
        source,
        r"unsupported architecture: .*config\.json: .*supported: .*ministral, mistral, mixtral",
    )


@single
def test_quantised_configuration(source):
    edit_json(source / "config.json", quantization_config={"quant_method": "gptq"})
    refuse(source, "quantised weights: .*gptq")


@single
@on("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
def test_quantised_weights(source, dtype):
    state = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].to(dtype)
    save_file(state, source / "model.safetensors")
    refuse(source, r"quantised weights: .*up_proj\.weight: .*float32, float16, bfloat16")


@single
def test_scales_of_quantised_weights(source):
    state = load_file(source / "model.safetensors")
    state["model.layers.0.mlp.up_proj.scales"] = torch.zeros(4).half()
    save_file(state, source / "model.safetensors")
    refuse(source, "quantised weights")


@single
def test_double_precision(source):
    state = load_file(source / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].double()
    save_file(state, source / "model.safetensors")
    refuse(source, r"unsupported dtype: .*model\.norm\.weight: F64")


@single
def test_quantised_params_json(source, prepared):
    (source / "model.safetensors").unlink()
    for file in (prepared / "mistral").iterdir():
        shutil.copy(file, source)
    edit_json(source / "params.json", quantization={"qformat_weight": "fp8_e4m3"})
    refuse(source, r"quantised weights: .*params\.json: quantization")


@single
def test_missing_configuration(source):
    (source / "config.json").unlink()
    refuse(source, r"missing file: .*config\.json")


@single
@on("text", ["{", "[1]", "\udcff", NESTED], ids=["cut", "list", "no-utf8", "nested"])
def test_damaged_configuration(source, text):
    (source / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refuse(source, r"not (JSON|UTF-8).*config\.json")


@single
def test_two_formats_and_how_to_choose(source, prepared):
    for file in (prepared / "mistral").iterdir():
        shutil.copy(file, source)
    refuse(
        source,
        r"two formats in one directory: .*hf \(model\.safetensors\), mistral "
        r"\(consolidated\.safetensors\): .*choose with --from hf or --from mistral; "
        r"in a run file with init_from\.format",
    )
    for kind in ("hf", "mistral"):
        with open_checkpoint(source, kind=kind) as opened:
            assert opened.kind == kind
    refuse(source, "no mistral_ms checkpoint: .*found hf", kind="mindspore")


@single
@on("kind", [None, "hf"])
def test_safetensors_beside_pickles_are_one_format_and_safetensors_are_read(source, prepared, kind):
    shutil.copy(prepared / "bin" / "pytorch_model.bin", source)
    with open_checkpoint(source, kind=kind) as opened:
        assert {info.file.name for info in opened.tensors.values()} == {"model.safetensors"}


@single
def test_unknown_kind(source):
    refuse(
        source, "unknown kind of checkpoint: kind: 'gguf': must be one of hf, mistral", kind="gguf"
    )


@on("source", ["tied"], indirect=True)
@on("equal", [True, False])
def test_tied_head_that_is_stored_must_equal_the_embedding(source, equal):
    state = load_file(source / "model.safetensors")
    head = state["model.embed_tokens.weight"].clone()
    if not equal:
        head[3, 5] += 1
    save_file(state | {"lm_head.weight": head}, source / "model.safetensors")
    if not equal:
        refuse(source, r"contradiction: .*lm_head\.weight: differs from model\.embed_tokens")
        return
    with open_checkpoint(source) as opened:
        assert "lm_head.weight" not in opened.names()
    convert(source, source.parent / "out", "hf")
    assert sorted(load_file(source.parent / "out" / "model.safetensors")) == sorted(state)


@on("source", ["bin"], indirect=True)
@on("damage", ["truncated", "garbage", "empty"])
def test_damaged_pickle(source, damage):
    file = source / "pytorch_model.bin"
    raw = file.read_bytes()
    file.write_bytes(
        {"truncated": raw[: len(raw) // 2], "garbage": b"junk" * 99, "empty": b""}[damage]
    )
    refuse(source, r"damaged, truncated or unsafe pickle: .*pytorch_model\.bin")


class Evil:
    """Would create a file when unpickled by an ordinary pickle reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@on("source", ["bin"], indirect=True)
@on("legacy", [True, False])
def test_pickle_that_runs_code_is_refused_and_does_not_run(source, tmp_path, legacy):
    state = {"model.norm.weight": Evil(tmp_path / "ran")}
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    refuse(source, r"damaged, truncated or unsafe pickle: .*weights_only=True")
    assert not (tmp_path / "ran").exists()


@on("source", ["bin"], indirect=True)
@on("content", [[torch.zeros(1)], {"step": 3}, {"model": {"x": torch.zeros(1)}}])
def test_pickle_that_is_no_state_dict(source, content):
    torch.save(content, source / "pytorch_model.bin")
    refuse(source, "not a state dict")


@on("source", ["bin"], indirect=True)
def test_sparse_tensor_in_a_pickle(source):
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    state["model.norm.weight"] = state["model.norm.weight"].float().to_sparse()
    torch.save(state, source / "pytorch_model.bin")
    refuse(source, r"unsupported tensor: .*model\.norm\.weight: .*sparse")


@on("source", ["bin"], indirect=True)
def test_pickle_without_torch_says_which_extra_to_install(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"missing package: torch: .*mistral_ms\[align\]"):
        open_checkpoint(source)


@on("source", ["dump"], indirect=True)
def test_dump_with_a_missing_file_in_the_middle(source):
    (source / "consolidated.01.pt").unlink()
    refuse(source, r"missing shard: .*consolidated\.01\.pt: .*numbered from 00 without gaps")


@on("source", ["dump"], indirect=True)
def test_dump_with_a_missing_last_file(source):
    (source / "consolidated.02.pt").unlink()
    refuse(source, r"missing tensor: .*layers\.2\.")


@on("source", ["dump"], indirect=True)
def test_shards_of_a_tensor_parallel_checkpoint(source):
    shutil.copy(source / "consolidated.00.pt", source / "consolidated.03.pt")
    refuse(source, r"tensor in two files: .*tensor-parallel checkpoints are not supported")


@on("source", ["mistral"], indirect=True)
def test_missing_params_json(source):
    (source / "params.json").unlink()
    refuse(source, r"missing file: .*params\.json")


def test_a_place_that_is_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "not a checkpoint: .*no weight files: known are")
    refuse(tmp_path / "nowhere", "no such directory: .*nowhere")
    (tmp_path / "file").write_text("x")
    refuse(tmp_path / "file", "not a directory: .*file")
