"""``experts`` and ``extract`` as a user types them."""

import json
import sys

import numpy as np
import pytest
from support.configs import TINY, model

from mistral_ms.checkpoint import open_checkpoint, our_shapes, save_native
from mistral_ms.cli import main
from mistral_ms.mixtures import domains, lifelong  # noqa: F401 - make their gates known


def saved(path, config):
    rng = np.random.default_rng(0)
    tensors = [(n, s, "float32", rng.random(s, np.float32)) for n, s in our_shapes(config).items()]
    save_native(path, config, tensors)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_mixtral.py", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit) as info:
            main()
        captured = capsys.readouterr()
        return info.value.code or 0, captured.out, captured.err

    return call


def test_experts_go_in_and_out(tmp_path, run):
    old = saved(tmp_path / "old", model(**TINY, moe={"num_local_experts": 4}))
    report = tmp_path / "report.json"
    code, out, _ = run("experts", old, tmp_path / "a", "--add", 2, "--json", report)
    assert code == 0
    assert "6 experts a layer, 4 of them frozen" in out
    assert json.loads(report.read_text())["experts"] == 6
    assert run("experts", old, tmp_path / "one.safetensors", "--export", 3)[0] == 0
    code, out, _ = run(
        "experts", tmp_path / "a", tmp_path / "b", "--import", tmp_path / "one.safetensors"
    )
    assert "7 experts a layer" in out
    code, out, _ = run("experts", tmp_path / "b", tmp_path / "c", "--remove", "0,5")
    assert "5 experts a layer, 3 of them frozen" in out
    code, out, _ = run("experts", old, tmp_path / "e", "--freeze", 2)
    assert "4 experts a layer, 2 of them frozen" in out
    code, _, err = run("experts", old, tmp_path / "f", "--freeze", 5)
    assert "impossible stages" in err
    with open_checkpoint(tmp_path / "c") as source, open_checkpoint(old) as before:
        name = "layers.1.moe.experts.w2"
        want = before.read(name)[[1, 2, 3, 0, 3]]
        np.testing.assert_array_equal(source.read(name), want)
    for wrong, message in (
        ((), "what shall be done?: experts: give one of --add"),
        (("--add", 1, "--remove", "1"), "several things at once: experts: --add, --remove"),
        (("--remove", "first"), "no numbers: --remove: first"),
    ):
        code, _, err = run("experts", old, tmp_path / "d", *wrong)
        assert code == 2
        assert message in err


def test_extract(tmp_path, run):
    gate = {"name": "random_routed", "domains": 4}
    moe = {"num_local_experts": 4, "num_experts_per_tok": 1, "gate": gate}
    old = saved(tmp_path / "old", model(**TINY, moe=moe))
    report = tmp_path / "report.json"
    code, out, _ = run("extract", old, tmp_path / "one", "--domain", 2, "--json", report)
    assert code == 0
    found = json.loads(report.read_text())
    assert f"domain 2, dense, {found['bytes'] / 1e3:.3g} kB of" in out
    assert f"({found['ratio']:.1%})" in out
    with open_checkpoint(tmp_path / "one") as source, open_checkpoint(old) as before:
        assert source.config.moe is None
        want = before.read("layers.0.moe.experts.w1")[2]
        np.testing.assert_array_equal(source.read("layers.0.feed_forward.w1.weight"), want)
    code, _, err = run("extract", old, tmp_path / "two", "--domain", 4)
    assert code == 2
    assert "no such domain: domain: 4: there are 0 to 3" in err
