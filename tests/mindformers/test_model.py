"""The models and their training step beside MindFormers' classes: weights, generation, losses."""

import mindspore as ms
import numpy as np
import pytest
from mindspore.nn.utils import no_init_parameters
from support.mindformers_files import EXPERTS

from mistral_ms.checkpoint.keys import HF, HF_FUSED, MINDFORMERS
from mistral_ms.checkpoint.layout import format_layout, our_shapes
from mistral_ms.errors import CheckpointError, ConfigError


def test_processes_that_cannot_train_together_are_refused(mf, monkeypatch):
    """Whoever launches them: a divided graph on a CPU, each for itself, a mean of gradients."""
    from mistral_ms.mindformers import modeling, wrapper

    monkeypatch.setattr(modeling, "is_divided", lambda: True)
    config = mf.MixtralConfig(
        hidden_size=32, num_heads=2, n_kv_heads=2, num_layers=1, seq_length=8,
        parallel_config={"data_parallel": 2},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="semi_auto_parallel on CPU: MindSpore divides graphs"):
        mf.MixtralForCausalLM(config)
    monkeypatch.setattr(wrapper.GlobalComm, "INITED", True)
    monkeypatch.setattr(wrapper, "get_group_size", lambda: 2)
    with pytest.raises(ConfigError, match="parallel_mode: stand_alone: processes that share"):
        wrapper.is_replicated()
    said = {"parallel_mode": "data_parallel", "gradients_mean": False}
    monkeypatch.setattr(wrapper.ms, "get_auto_parallel_context", said.get)
    assert wrapper.is_replicated()
    said["gradients_mean"] = True
    with pytest.raises(ConfigError, match="gradients_mean: True: the losses of processes"):
        wrapper.is_replicated()


def test_the_divided_graph_generates_as_the_model(mf, monkeypatch, tmp_path):
    """One process, its operators one by one: greedy, ragged, more prompts than rows; against whole
    sequences through the ordinary model.
    """
    from mistral_ms.mindformers import modeling

    keys = dict(
        hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, n_kv_heads=1,
        vocab_size=64, seq_length=16, initializer_range=0.2, num_local_experts=4,
        compute_dtype="float32",
    )  # fmt: skip
    plain = mf.MixtralForCausalLM(mf.MixtralConfig(**keys))
    plain.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(modeling, "is_divided", lambda: True)
    cached = mf.MixtralConfig(**keys, use_past=True, batch_size=2)
    with pytest.raises(ConfigError, match=r"no weights: .*weights_from"):
        mf.MixtralForCausalLM(cached)
    cached.weights_from = str(tmp_path / "model")
    model = mf.MixtralForCausalLM(cached)
    with pytest.raises(ConfigError, match="parts of a model"):
        model.save_pretrained(tmp_path / "parts")
    prompts = [[1, 5, 6, 7, 9], [1, 30, 4], [1, 7]]
    found = model.generate(prompts, max_new_tokens=3, do_sample=False, eos_token_id=[-1])
    for prompt, row in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(3):
            positions = ms.Tensor(np.arange(len(ids), dtype=np.int32)[None])
            logits = plain.language_model(ms.Tensor(np.array([ids], np.int32)), positions)
            ids.append(int(logits.asnumpy()[0, -1].argmax()))
        assert list(map(int, row)) == ids


def test_what_router_monitor_says():
    pytest.importorskip("mindformers.core", reason="MindFormers is not installed")
    from mistral_ms.mindformers.monitor import StepLosses, describe

    routed, kept = np.array([[6.0, 2.0], [4.0, 4.0]]), np.array([[5.0, 2.0], [4.0, 4.0]])
    found = describe(StepLosses(2.5, 2.125, 0.5, routed, kept))
    assert found == (
        "lm_loss 2.500000, aux_loss 2.125000, z_loss 0.500000, dropped 0.0625, "
        "expert load max/min by layer 1.50/0.50 1.00/1.00"
    )
    stage = describe(StepLosses(None, 2.125, 0.5, routed[:1], routed[:1], layers=(3,)))
    assert stage.startswith("aux_loss 2.125000, z_loss 0.500000 of layers 3, dropped 0.0000")


def test_router_monitor_counts_on_after_a_resume(monkeypatch):
    """Their trainer counts from 1 again, and tells MFLossMonitor how many steps there were."""
    pytest.importorskip("mindformers.core", reason="MindFormers is not installed")
    from mindformers import MFLossMonitor
    from mindspore import nn
    from mindspore.train.callback._callback import InternalCallbackParam, RunContext

    from mistral_ms.mindformers import monitor

    network, table, said = nn.Cell(), np.ones((1, 2)), []
    network.losses = lambda: monitor.StepLosses(2.5, 2.0, 0.5, table, table)
    monkeypatch.setattr(monitor.logger, "info", lambda text, *args: said.append(text % args))
    for begun, step, seen in ((0, 2, 2), (20, 2, 22), (21, 2, None)):
        theirs = MFLossMonitor(initial_step=begun, dataset_size=8, origin_epochs=4)
        ours = monitor.RouterMonitor(per_print_times=2)
        state = {"cur_step_num": step, "train_network": network, "list_callback": [ours, theirs]}
        ours.on_train_step_end(RunContext(InternalCallbackParam(state)))
        assert [line.split(":")[0] for line in said] == [f"step {seen}"] * (seen is not None)
        said.clear()


def test_columns_are_those_that_the_file_names():
    pytest.importorskip("mindformers.core", reason="MindFormers is not installed")
    from mistral_ms.mindformers.wrapper import in_order

    assert in_order(("input_ids",), (1,)) == (1, None)
    assert in_order(("labels", "input_ids"), (1, 2)) == (2, 1)
    with pytest.raises(ValueError, match="other columns"):
        in_order(("input_ids",), (1, 2, 3))  # as with eod_reset


@pytest.mark.parametrize("kind", ["mixtral", "mistral"])
@pytest.mark.parametrize("table", [HF, HF_FUSED], ids=["transformers 4", "transformers 5"])
def test_weights_of_hugging_face_are_taken_by_name_or_refused(mf, kind, table):
    """All of them, in any order of the dictionary; experts by their numbers."""
    model_class = dict(mixtral=mf.MixtralForCausalLM, mistral=mf.MistralForCausalLM)[kind]
    keys = dict(
        hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, n_kv_heads=1,
        vocab_size=11, seq_length=8,
    )  # fmt: skip
    experts = {} if kind == "mistral" else {"num_local_experts": 3, "num_experts_per_tok": 2}
    architecture = model_class.config_class(**keys, **experts).architecture()
    generator = np.random.default_rng(0)
    source = {
        name: ms.Parameter(ms.Tensor(generator.standard_normal(shape).astype(np.float32)))
        for name, shape in reversed(format_layout(architecture, table).shapes.items())
    }
    found = model_class.convert_weight_dict(source, model_config={"type": "x", **keys})
    assert {name: each.shape for name, each in found.items()} == our_shapes(architecture)
    assert set(map(model_class.convert_name, source)) <= set(found)
    for name in ("lm_head.weight", "layers.0.moe.router.weight", "adam_m.norm.weight"):
        assert model_class.convert_name(name) == name  # ours, and MindFormers' own
    block = "model.layers.1.block_sparse_moe.experts"
    if kind == "mixtral" and table is HF:
        w2 = [source[f"{block}.{e}.w2.weight"].asnumpy() for e in range(3)]
    elif kind == "mixtral":
        w2 = source["model.layers.1.mlp.experts.down_proj"].asnumpy()
        both = source["model.layers.1.mlp.experts.gate_up_proj"].asnumpy()
        halves = [found[f"layers.1.moe.experts.{w}"].asnumpy() for w in ("w1", "w3")]
        assert np.array_equal(np.concatenate(halves, 1), both)
    if kind == "mixtral":
        assert np.array_equal(found["layers.1.moe.experts.w2"].asnumpy(), w2)
    del source["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(CheckpointError, match=r"missing tensor.*layers\.1\.self_attn\.q_proj"):
        model_class.convert_weight_dict(source, model_config=keys)


def test_weights_that_a_checkpoint_lacks_are_named(mf):
    """MindFormers makes the model without values, loads what there is, and logs the rest."""
    config = mf.MistralConfig(
        hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, n_kv_heads=1,
        vocab_size=11, seq_length=8,
    )  # fmt: skip
    with no_init_parameters():
        model = mf.MistralForCausalLM(config)
    for name, parameter in model.weights().items():
        if name != "norm.weight":
            parameter.set_data(ms.Tensor(np.ones(parameter.shape, np.float32)))
    with pytest.raises(CheckpointError, match=r"norm\.weight: the checkpoint lacks 1 of 12"):
        model.init_parameters_data()


def test_ckpt_files_of_1_x_under_their_own_launcher(mf, tmp_path):
    """Its training reads them by names that it does not change: that nothing fits is an error which
    says what to set. The model itself reads them.
    """
    from mindformers.trainer.utils import load_ckpt
    from mindformers.wrapper.wrapper import DataOrderWrapperCell

    keys = dict(
        hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, n_kv_heads=1,
        vocab_size=11, seq_length=8, moe_config=dict(EXPERTS, expert_num=3),
    )  # fmt: skip
    architecture = mf.MixtralConfig(**keys).architecture()
    held = {
        name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        for name, shape in format_layout(architecture, MINDFORMERS).shapes.items()
    }
    file = tmp_path / "mixtral_rank_0-1_2.ckpt"
    ms.save_checkpoint([{"name": n, "data": ms.Tensor(a)} for n, a in held.items()], str(file))
    with no_init_parameters():
        model = mf.MixtralForCausalLM(mf.MixtralConfig(**keys))
    network = DataOrderWrapperCell(["input_ids"], model)
    rate = mf.CosineWithWarmUpLR(learning_rate=1e-3, warmup_steps=0, total_steps=2)
    mf.MoETrainOneStepCell(network, mf.AdamW(model.trainable_params(), learning_rate=rate))
    given = dict(
        checkpoint={"load_path": str(tmp_path)}, load_ckpt_format="ckpt", runner_config={},
        model={"model_config": {}},
    )  # fmt: skip
    load_ckpt(mf.MindFormerConfig(**given), network)
    with pytest.raises(CheckpointError, match=r"lacks 11 of 13 weights: set model_config\.weights"):
        network.init_parameters_data()
    reads = mf.MixtralForCausalLM(mf.MixtralConfig(**keys, weights_from=str(file)))
    w2 = reads.weights()["layers.0.moe.experts.w2"].asnumpy()
    assert np.array_equal(w2, held["model.layers.0.feed_forward.ffn.w2.weight"])
