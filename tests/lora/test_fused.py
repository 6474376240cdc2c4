"""PEFT's files beside the classes of transformers 5, by PEFT's formula: neither is needed."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mistral_ms.checkpoint import inspect, keys
from mistral_ms.checkpoint.adapters import open_adapter, write_peft
from mistral_ms.checkpoint.layout import format_layout
from mistral_ms.config import LoraConfig, ModelConfig
from mistral_ms.config.peft import from_peft, to_peft
from mistral_ms.errors import CheckpointError, ConfigError
from mistral_ms.weights import A, B

E, H, I, LAYERS, R = 3, 8, 12, 2, 2  # noqa: E741
MODEL = ModelConfig(
    vocab_size=48, hidden_size=H, intermediate_size=I, num_hidden_layers=LAYERS,
    num_attention_heads=2, num_key_value_heads=2, moe=dict(num_local_experts=E),
)  # fmt: skip
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
GIVEN = {
    "peft_type": "LORA", "r": R, "lora_alpha": 3, "target_modules": ["q_proj"],
    "target_parameters": [*BOTH, "gate.weight"], "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip
DOUBLED = {
    "target_parameters": ["gate_up_proj", "down_proj"],
    "rank_pattern": {r".*\.gate_up_proj": 2 * R},
    "alpha_pattern": {r".*\.gate_up_proj": 6},
}
"""What PEFT makes of ``target_modules: [w1, w2, w3]``."""


def saved(path, layers=range(LAYERS), gate_up=R, outer="down_proj", **more):
    """An adapter of the given keys, and all tensors that it has; ``outer`` stands alone without
    ``gate_up_proj``."""
    random = np.random.default_rng(0)
    given = GIVEN | more
    sizes = {}
    for layer in layers:
        block = f"base_model.model.model.layers.{layer}."
        if given["target_modules"]:
            sizes[f"{block}self_attn.q_proj"] = (R, H, H)
        if any(name.endswith("gate.weight") for name in given["target_parameters"]):
            sizes[f"{block}mlp.gate"] = (R, H, E)
        if outer == "down_proj":
            sizes[f"{block}mlp.experts"] = (E * R, I, H)
        inner = ".base_layer" if outer == "down_proj" else ""
        if any("gate_up" in name for name in given["target_parameters"]):
            sizes[f"{block}mlp.experts{inner}"] = (E * gate_up, H, 2 * I)
    tensors = {}
    for name, (rank, inputs, outputs) in sizes.items():
        for factor, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = random.standard_normal(shape).astype(np.float32)
            tensors[f"{name}.lora_{factor}.weight"] = values
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(given))
    save_file(tensors, path / "adapter_model.safetensors")
    return tensors


def change(tensors, prefix):
    """B A of all experts [E, O, I], as PEFT forms it."""
    a, b = (tensors[f"{prefix}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
    return np.einsum("ore,eri->eoi", b.reshape(len(b), -1, E), a.reshape(E, -1, a.shape[1]))


def product(source, layer, matrix):
    """Of our own tensors: [E, O, I]."""
    path = f"layers.{layer}.moe.experts.{matrix}_linear"
    a, b = (source.read(f"{path}.lora_{factor}").astype(np.float64) for factor in "AB")
    return b @ a


@pytest.mark.parametrize(
    ("more", "rank"),
    [({}, R), ({**DOUBLED, "gate_up": 2 * R}, 2 * R)],
    ids=["as given", "rank doubled"],
)
def test_every_matrix_changes_as_in_the_file(tmp_path, more, rank):
    tensors = saved(tmp_path / "peft", **more)
    with open_adapter(tmp_path / "peft", MODEL) as source:
        lora = source.config.lora
        assert (lora.r, lora.scaling) == (rank, 1.5)
        for layer in range(LAYERS):
            experts = f"base_model.model.model.layers.{layer}.mlp.experts"
            gate_up, down = change(tensors, f"{experts}.base_layer"), change(tensors, experts)
            # sums of the same few products in another order, in float64
            for matrix, wanted in (("w1", gate_up[:, :I]), ("w3", gate_up[:, I:]), ("w2", down)):
                np.testing.assert_allclose(product(source, layer, matrix), wanted, atol=1e-12)
            a, b = (source.read(f"layers.{layer}.attention.q_proj.linear.lora_{f}") for f in "AB")
            q_proj = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            np.testing.assert_array_equal(a[:R], tensors[f"{q_proj}.lora_A.weight"])
            np.testing.assert_array_equal(b[:, :R], tensors[f"{q_proj}.lora_B.weight"])
            assert not a[R:].any() and not b[:, R:].any()
        write_peft(source, tmp_path / "written", None)
        write_peft(source, tmp_path / "fused", None, fused=True)
        names = source.names()
        held = {name: source.read(name) for name in names}
    kinds = {"written": "peft", "fused": "peft-fused"}
    for directory, kind in kinds.items():
        with open_adapter(tmp_path / directory, MODEL) as again:
            assert (again.kind, again.names()) == (kind, names)
            assert (again.config.lora.r, again.config.lora.scaling) == (rank, 1.5)
            for name, values in held.items():
                np.testing.assert_array_equal(again.read(name), values)
    if not more:  # with one rank, what is written is what was read
        found = load_file(tmp_path / "fused" / "adapter_model.safetensors")
        assert set(found) == set(tensors)
        for name, values in tensors.items():
            np.testing.assert_array_equal(found[name], values)
    assert "w1, w2, w3" in inspect(tmp_path / "peft").layout


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("modules", "rank"), [(("w1", "w2", "w3", "gate", "q_proj"), 2 * R), (("w3", "o_proj"), R)]
)
def test_adapters_of_version_4_are_written_for_5(tmp_path, modules, rank, rslora):
    """Those of w1 and w3, of which each has its A, become one of twice the rank."""
    lora = LoraConfig(r=R, lora_alpha=3, target_modules=modules, use_rslora=rslora)
    config = MODEL.model_copy(update={"lora": lora})
    random = np.random.default_rng(1)
    tensors = {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in format_layout(config, keys.PEFT).shapes.items()
    }
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(to_peft(lora)))
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    with open_adapter(tmp_path / "peft", MODEL) as source:
        write_peft(source, tmp_path / "fused", None, fused=True)
        with open_adapter(tmp_path / "fused", MODEL) as again:
            found = again.config.lora
            # a root of two in the factor, twice
            assert (found.r, found.scaling) == (rank, pytest.approx(lora.scaling, rel=1e-14))
            for name in filter(lambda name: name.endswith(A), source.names()):
                path = name.removesuffix(A)
                for one in (source, again):
                    a, b = (one.read(f"{path}{factor}").astype(np.float64) for factor in (A, B))
                    if one is source:
                        wanted = b @ a
                # what is added is products with zeros
                np.testing.assert_array_equal(b @ a, wanted)
            if (
                "w1" not in modules
            ):  # adapters of one half: the other's are there, and change nothing
                w1 = again.read(f"layers.0.moe.experts.w1_linear.{B}")
                assert not w1.any() and not set(again.names()) <= set(source.names())


def test_decomposed_experts_are_not_written_for_5(tmp_path):
    lora = LoraConfig(r=R, target_modules=("w1", "w3"), use_dora=True)
    shapes = format_layout(MODEL.model_copy(update={"lora": lora}), keys.PEFT).shapes
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(to_peft(lora)))
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    message = r"lora\.use_dora: .*does not decompose"
    with (
        open_adapter(tmp_path / "peft", MODEL) as source,
        pytest.raises(ConfigError, match=message),
    ):
        write_peft(source, tmp_path / "fused", None, fused=True)
    assert not (tmp_path / "fused").exists()


def test_one_of_a_modules_parameters_is_not_nested(tmp_path):
    """And a parameter of one layer is adapted there alone; ``target_modules`` may be empty."""
    parameter = "layers.1.mlp.experts.gate_up_proj"
    tensors = saved(
        tmp_path / "peft", [1], outer=None, target_parameters=[parameter], target_modules=[]
    )
    with open_adapter(tmp_path / "peft", MODEL) as source:
        wanted = change(tensors, "base_model.model.model.layers.1.mlp.experts")
        np.testing.assert_allclose(product(source, 1, "w3"), wanted[:, I:], atol=1e-12)
        assert len(source.names()) == 4  # A and B of w1 and w3


@pytest.mark.parametrize(
    ("modules", "parameters", "found"),
    [
        (["q_proj"], BOTH, ("q_proj", "w1", "w2", "w3")),
        (None, ["gate.weight"], ("gate",)),
        (
            [r"self_attn.q_proj"], ["layers.1.mlp.gate.weight"],
            r"(?:(?:.*\.)?(?:self_attn\.q_proj))|(?:.*\.1\.block_sparse_moe\.(?:gate))",
        ),
        (
            ".*q_proj", ["down_proj"],
            r"(?:.*q_proj)|(?:.*\.\d+\.block_sparse_moe\.experts\.\d+\.(?:w2))",
        ),
    ],
)  # fmt: skip
def test_modules_of_version_4(modules, parameters, found):
    given = {**GIVEN, "target_modules": modules, "target_parameters": parameters}
    lora = from_peft(given, "file")
    assert lora == LoraConfig(r=R, lora_alpha=3, target_modules=found)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"target_parameters": ["mlp.experts.gate_proj"]}, "target_parameters: 'mlp.experts.gate_"),
        ({"target_parameters": ["self_attn.gate.weight"]}, "target_parameters: 'self_attn"),
        ({"target_parameters": "gate_up_proj.weight"}, "target_parameters: 'gate_up_proj.weight'"),
        ({"target_parameters": [3]}, "target_parameters: 3"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern: .*one positive number for gate_up_proj"),
        ({"rank_pattern": {"gate_up_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"gate_up_proj": 4}}, "factors 0.75 of gate_up_proj and 1.5 of the"),
        ({**DOUBLED, "use_rslora": True}, "alpha_pattern: factors 3 of gate_up_proj and 2.12"),
        ({"use_dora": True}, "use_dora"), ({"exclude_modules": ["k_proj"]}, "exclude_modules"),
        ({"r": 0}, "file: r"),
    ],
)  # fmt: skip
def test_what_is_refused(more, message):
    with pytest.raises(ConfigError, match=message):
        from_peft(GIVEN | more, "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAST}.lora_A.weight"), "missing tensor: .*experts.base_layer.lora_A"),
        (lambda t: t.update({f"{LAST}x.lora_A.weight": ONE}), "extra tensor.*base_layerx"),
        (lambda t: t.update({f"{LAST}.lora_B.weight": ONE}), r"wrong shape.*\[24, 6\]"),
    ],
)  # fmt: skip
def test_tensors_that_fit_no_weight(tmp_path, change, message):
    tensors = saved(tmp_path / "peft")
    change(tensors)
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_adapter(tmp_path / "peft", MODEL)


ONE = np.ones((1, 1), np.float32)
LAST = f"base_model.model.model.layers.{LAYERS - 1}.mlp.experts.base_layer"
