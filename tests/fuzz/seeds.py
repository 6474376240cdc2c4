"""Small valid inputs, written by the formats' own libraries where there are any."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from mistral_ms.checkpoint import keys, presplit, save_native
from mistral_ms.checkpoint.ckpt_file import encode_record_head
from mistral_ms.checkpoint.config_file import encode_config
from mistral_ms.checkpoint.layout import format_layout
from mistral_ms.config import ModelConfig, encode_yaml
from mistral_ms.parallel.topology import Topology, written_parts
from mistral_ms.weights import specs

SIZES = dict(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    torch_dtype="float32",
)
DENSE = ModelConfig(**SIZES, sliding_window=8)
SPARSE = ModelConfig(**SIZES, moe={"num_local_experts": 2})
RUN = {
    "model": {**SIZES, "moe": {"num_local_experts": 2}},
    "routing": {"policy": "capacity", "capacity_factor": 1.1},
    "training": {
        "max_steps": 4,
        "seq_length": 8,
        "global_batch_size": 4,
        "optimizer": {"learning_rate": 1e-3},
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
    },
    "parallel": {"dp": 2, "ep": 2},
    "data": {"inputs": ["a.txt"], "tokenizer": "packaged-v1"},
    "checkpoint": {"save_steps": 2},
}


def arrays(config: ModelConfig, table: keys.KeyTable) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = format_layout(config, table).shapes
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def write_config(path: Path, config: ModelConfig, kind: str) -> None:
    path.mkdir()
    name, values = encode_config(config, kind)
    (path / name).write_text(json.dumps(values, indent=1))


def save(tensors: dict[str, np.ndarray], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def hf_single(path: Path) -> None:
    write_config(path, DENSE, "hf")
    save(arrays(DENSE, keys.HF), path / "model.safetensors")
    (path / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')


def in_shards(path: Path, stem: str, end: str, write: Callable) -> None:
    tensors = list(arrays(SPARSE, keys.HF).items())
    weight_map = {}
    for number in (1, 2):
        name = f"{stem}-{number:05d}-of-00002.{end}"
        part = dict(tensors[number - 1 :: 2])
        write(part, path / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / f"{stem}.{end}.index.json").write_text(json.dumps(index))


def hf_shards(path: Path) -> None:
    write_config(path, SPARSE, "hf")
    in_shards(path, "model", "safetensors", save)


def _torch_save(tensors: dict[str, np.ndarray], path: Path, zipped: bool = True) -> None:
    import torch

    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)


def bin_zip(path: Path) -> None:
    write_config(path, DENSE, "hf")
    _torch_save(arrays(DENSE, keys.HF), path / "pytorch_model.bin")


def bin_shards(path: Path) -> None:
    write_config(path, SPARSE, "hf")
    in_shards(path, "pytorch_model", "bin", _torch_save)


def bin_legacy(path: Path) -> None:
    write_config(path, DENSE, "hf")
    _torch_save(arrays(DENSE, keys.HF), path / "pytorch_model.bin", zipped=False)


def mistral(path: Path) -> None:
    write_config(path, SPARSE, "mistral")
    save(arrays(SPARSE, keys.MISTRAL), path / "consolidated.safetensors")


def mistral_pth(path: Path) -> None:
    write_config(path, DENSE, "mistral")
    _torch_save(arrays(DENSE, keys.MISTRAL), path / "consolidated.00.pth")


def mindformers(path: Path) -> None:
    path.mkdir()
    name, values = encode_config(SPARSE, "mindformers")
    (path / name).write_bytes(encode_yaml(values))
    save(arrays(SPARSE, keys.MINDFORMERS_GMM), path / "mixtral_rank_0-1_2.safetensors")


def mindformers_ckpt(path: Path) -> None:
    """MindSpore's files have no other small writer; that they are its own, other tests ask."""
    path.mkdir()
    name, values = encode_config(SPARSE, "mindformers")
    (path / name).write_bytes(encode_yaml(values))
    tensors = {**arrays(SPARSE, keys.MINDFORMERS), "loss_scale": np.ones(1, np.float32)}
    records = [
        encode_record_head(key, "F32", array.shape, array.nbytes) + array.tobytes()
        for key, array in tensors.items()
    ]
    (path / "mindspore_model.ckpt").write_bytes(b"".join(records))


def native(path: Path) -> None:
    """With all that a checkpoint of a training has."""
    weights = arrays(SPARSE, keys.OURS)
    moments = {f"mean.{name}": array for name, array in weights.items()}
    state = {"format": 1, "step": 3, "updates": 3, "loss_scale": {"scale": 1.0, "good_steps": 0}}

    def named(tensors: dict[str, np.ndarray]) -> list:
        return [(name, array.shape, "float32", array) for name, array in tensors.items()]

    save_native(
        path,
        SPARSE,
        named(weights),
        {"state.json": json.dumps(state).encode()},
        extra_tensors={"optimizer": named(moments)},
    )


def parts(path: Path) -> None:
    """A checkpoint in parts, a file for every rank."""
    from mistral_ms.config import ParallelConfig

    source = path.with_name(f"{path.name}-source")
    hf_shards(source)
    topology = Topology.of(ParallelConfig(dp=2, ep=2))
    ranks = [written_parts(specs(SPARSE), topology, coords.rank) for coords in topology.all_coords]
    presplit(source, path, ranks, "dp=2 ep=2")


def run_yaml(path: Path) -> None:
    path.mkdir()
    (path / "run.yaml").write_text(yaml.safe_dump(RUN))


def run_files(path: Path) -> None:
    """A run whose model is the directory of a checkpoint."""
    path.mkdir()
    (path / "run.yaml").write_text(yaml.safe_dump({**RUN, "model": "model"}))
    write_config(path / "model", SPARSE, "hf")


def predict_yaml(path: Path) -> None:
    path.mkdir()
    served = {"model": RUN["model"], "prediction": {"batch": 2, "max_length": 16, "chunk": 8}}
    (path / "run.yaml").write_text(yaml.safe_dump(served))


def tokenizer_json(path: Path) -> None:
    """Byte fallback and a few words, as in Mistral's converted vocabularies."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    names += ["▁", "a", "b", "c", "▁a", "bc", "▁abc"]
    merges = [("▁", "a"), ("b", "c"), ("▁a", "bc")]
    model = models.BPE(
        {name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ bos_token + m.role + m.content + eos_token }}{% endfor %}"
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "add_bos_token": True,
        "added_tokens_decoder": {"266": {"content": "<x>", "special": True, "lstrip": False}},
        "chat_template": template,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def chat(path: Path) -> None:
    """A tokenizer with what stands beside it: a template and names of tokens."""
    tokenizer_json(path)
    (path / "chat_template.jinja").write_text(
        "{% for message in messages %}\n"
        "{{ '<s>' + message['role'] + ' ' }}\n"
        "{{ message.content | trim }}\n"
        "{{ '</s>' }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}\n"
    )
    (path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (path / "added_tokens.json").write_text('{"<unk>": 0}')


def tokenizer_model(path: Path) -> None:
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog and a cat", "cabbage"] * 5),
        model_writer=written,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=9,
    )
    path.mkdir()
    (path / "tokenizer.model").write_bytes(written.getvalue())
    (path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    (path / "added_tokens.json").write_text('{"<x>": 300}')
    (path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')


def documents(path: Path) -> None:
    path.mkdir()
    turns = [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Hello."}]
    lines = [{"text": "one\ntwo"}, {"messages": turns}, {"text": "three", "id": 3}]
    (path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "b.txt").write_text("first line\n\nsecond ünï line\r\n")


def dataset(path: Path) -> None:
    """A description and files of its sizes; what MindRecord itself reads is checked by digest."""
    path.mkdir()
    files = []
    for name, sequences in (("sequences-0.mindrecord", 3), ("sequences-0.mindrecord.db", 0)):
        content = name.encode() * 9
        (path / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files.append({"name": name, "size": len(content), "sha256": digest, "sequences": sequences})
    counts = dict.fromkeys(("documents", "tokens", "predicted", "padded", "dropped"), 5)
    info = {
        "format": 1,
        "config": {"seq_length": 8},
        "vocabulary": {"vocab_size": 300, "sha256": "0" * 64, "source": "tokenizer.model"},
        "counts": {**counts, "sequences": 3, "silent_sequences": 0, "skipped": {}},
        "files": files,
    }
    (path / "dataset.json").write_text(json.dumps(info, indent=1))
