"""One value decides which implementation runs; it is logged once, and an error if missing."""

from __future__ import annotations

import logging

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mistral_ms.config import RoutingConfig
from mistral_ms.config.base import validate
from mistral_ms.errors import ConfigError, KernelError
from mistral_ms.moe import local_dispatcher
from mistral_ms.ops import cann, custom, reference, select
from mistral_ms.ops.custom import library
from mistral_ms.ops.reference_cells import ComposedPackedSwiGLU, ReferenceScoring

OPERATIONS = {
    "gating_top_k": lambda kernels: select.gating_top_k(kernels, 2, True),
    "scored_top_k": lambda kernels: select.scored_top_k(
        kernels, 8, 2, True, reference.ScoringRules(), True
    ),
    "pack_choices": lambda kernels: select.pack_choices(kernels, 8),
    "assign_slots": lambda kernels: select.assign_slots(kernels, 8, False),
    "permute": select.permute,
    "unpermute": select.unpermute,
}


@pytest.fixture(autouse=True)
def nothing_built(monkeypatch, tmp_path):
    monkeypatch.setattr(select, "_logged", set())
    monkeypatch.setattr(library, "_chosen", [])
    monkeypatch.setattr(library, "TWIN", tmp_path / "libmistral_ms_twin.so")
    monkeypatch.setattr(library, "PACKAGE_RECORD", tmp_path / "opp_path.txt")


def test_the_reference_is_the_default():
    dispatcher = local_dispatcher(8, RoutingConfig())
    assert type(dispatcher.permute) is reference.Permute
    assert type(dispatcher.unpermute) is reference.Unpermute


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_choice_is_logged_once(operation, caplog):
    with caplog.at_level(logging.INFO, logger="mistral_ms.ops.select"):
        for _ in range(3):
            OPERATIONS[operation]("reference")
    assert [record.message for record in caplog.records] == [f"{operation}: reference"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_custom_without_a_build_says_how_to_build(operation):
    with pytest.raises(KernelError, match=r"missing: .*twin.so: .*build_kernels.sh --target twin"):
        OPERATIONS[operation]("custom")


@pytest.mark.parametrize(
    ("experts", "k", "groups", "lack"),
    [(257, 2, 1, "256 experts"), (64, 9, 1, "8 choices"), (64, 2, 16, "8 groups")],
)
def test_the_reference_chooses_where_the_operator_takes_no_such_sizes(
    experts, k, groups, lack, caplog
):
    rules = reference.ScoringRules(groups=groups)
    cell = select.scored_top_k("custom", experts, k, True, rules, False)
    assert type(cell) is ReferenceScoring
    assert f"scored_top_k: reference (the operator takes {lack} at most)" in caplog.messages


def test_packed_swiglu_is_made_of_swiglu_where_no_operator_is_asked_for(caplog):
    assert type(select.packed_swiglu("reference")) is ComposedPackedSwiGLU
    with pytest.raises(KernelError, match=r"missing: .*build_kernels.sh --target twin"):
        select.packed_swiglu("custom")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_cann_exists_on_ascend_only(operation):
    with pytest.raises(KernelError, match=f"missing: {operation}: kernels=cann: .*Ascend only"):
        OPERATIONS[operation]("cann")


def test_custom_on_ascend_wants_the_installed_package(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "on_ascend", lambda: True)
    with pytest.raises(KernelError, match=r"opp_path.txt: .*build_kernels.sh --target npu"):
        custom.check_installed()
    library.PACKAGE_RECORD.write_text(f"{tmp_path / 'gone'}\n")
    with pytest.raises(KernelError, match=r"gone: .*build_kernels.sh --target npu"):
        custom.check_installed()
    library.PACKAGE_RECORD.write_text(f"{tmp_path}\n")
    custom.check_installed()


def test_cann_has_one_match_and_the_log_says_what_else_runs(monkeypatch, caplog):
    monkeypatch.setattr(custom, "on_ascend", lambda: True)
    with caplog.at_level(logging.INFO, logger="mistral_ms.ops.select"):
        cells = {name: make("cann") for name, make in OPERATIONS.items()}
    assert type(cells["gating_top_k"]) is cann.GatingTopK
    assert type(cells["permute"]) is reference.Permute
    messages = [record.message for record in caplog.records]
    assert messages[0] == "gating_top_k: cann"
    for name, message in zip(list(OPERATIONS)[1:], messages[1:], strict=True):
        assert message == f"{name}: reference (CANN has no matching primitive)"


def test_another_value_is_refused_by_the_configuration():
    with pytest.raises(ConfigError, match="kernels"):
        validate(RoutingConfig, {"kernels": "fastest"}, "run.yaml")


@pytest.mark.parametrize("normalize", [True, False])
def test_what_surrounds_the_primitive_of_cann_is_the_reference(normalize):
    """The primitive runs on Ascend only; with its experts found otherwise, the rest runs here."""
    rng = np.random.default_rng(0)
    logits = Tensor((2 * rng.normal(size=(9, 6))).astype(np.float32))
    mix, share = (Tensor(rng.normal(size=(9, n)).astype(np.float32)) for n in (2, 6))
    cell = cann.GatingTopK(2, normalize)
    cell.find = lambda x, finished, k: (None, reference.gating_top_k(x, k, True)[1], None)

    def loss(gating):
        def total(x):
            weights, experts, probs = gating(x)
            return (weights * mix).sum() + (probs * share).sum(), experts

        return ms.value_and_grad(total, has_aux=True)(logits)

    (want, chosen), gradient = loss(lambda x: reference.gating_top_k(x, 2, normalize))
    (got, experts), found = loss(cell)
    np.testing.assert_array_equal(experts.numpy(), chosen.numpy())
    # float32 sums of a few terms of size one, in another order
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-5)
    np.testing.assert_allclose(found.numpy(), gradient.numpy(), atol=1e-6)
