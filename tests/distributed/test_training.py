"""A training in any layout is that of one process with the same dispatch groups."""

import functools
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from distributed import corners
from distributed.training import (
    CASES,
    FROZEN,
    LAYOUTS,
    TIED,
    WATCHED,
    before,
    data,
    dpo,
    groups,
    model,
    routing,
    steps,
    training,
)
from support.training import run_steps

from mistral_ms.config import ParallelConfig
from mistral_ms.models import CausalLM
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.parallel.topology import Topology, weight_slice
from mistral_ms.training import TrainStep, make_objective
from mistral_ms.training import step as training_step
from mistral_ms.training.preferences import add_reference
from mistral_ms.weights import by_name, init_values, specs

LOSS = 1e-5
"""Relative; sums of float32 in another order."""
WEIGHTS = 1e-4
"""Relative L2 norm, at a learning rate of 1e-3: Adam turns a gradient that is rounding noise into
a step of full size."""
NORMS = 1e-4
"""Relative, of one weight's gradient; 8e-7 measured on two processes."""
HALF = 5e-4
"""For float16 where experts are divided or stages differ: its rounding, 2^-11. See
``HALF_STEPS``: no token changes its expert."""
each_case = pytest.mark.parametrize(("world", "name", "variant"), CASES)


@functools.cache
def trained(architecture, times, variant, compiled):
    """One process with ``times`` as many micro-batches: the steps, the weights after them, the
    steps with the batches of ``corners``, the weights at the end, and the layers' outputs with
    them. Ranks always compile.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(training_step, "graph_mode", nullcontext)
        return _trained(architecture, times, variant)


def _trained(architecture, times, variant):
    config = training(variant, times)
    whole = CausalLM(architecture, routing(variant), dtype=config.dtype)
    whole.initialize(0)
    objective = make_objective(
        whole, config, pooled_aux=False, before=before(variant), dpo=dpo(variant)
    )
    update, sequences = TrainStep(objective, config), data(architecture, variant)
    with tempfile.TemporaryDirectory() as folder:
        path, alone = Path(folder) / "pairs.npz", ParallelContext(ParallelConfig())
        add_reference(whole, config, sequences, path, alone, lambda line: None)
    results = run_steps(update, sequences, steps(variant))
    weights = {name: p.asnumpy().copy() for name, p in whole.weights().items()}
    after = {}
    if variant in corners.TRAINED:
        for name, batch in corners.batches().items():
            after[name] = [update(batch) for _ in range(corners.STEPS)]
    ends = {name: p.asnumpy() for name, p in whole.weights().items()}
    outputs = update.layer_statistics(sequences.batch(0))
    return results, weights, after, ends, outputs


def alone(world, name, variant):
    """What one process gets with the dispatch groups of a layout."""
    compiled = "float16" in variant  # whose operators round otherwise where each is called alone
    return trained(model(name), groups(world, name), variant, compiled)


def held(arrays, prefix):
    """What one rank saved under a prefix, by the rest of the name."""
    return {
        name.removeprefix(prefix): values
        for name, values in arrays.items()
        if name.startswith(prefix)
    }


def tolerance(name, variant, usual):
    if name == "dp2":
        return 0.0  # the same kernels on the same rows, and a sum of two
    return HALF if "float16" in variant else usual


@each_case
@pytest.mark.parametrize("figure", ["loss", "lm_loss", "aux_loss", "z_loss", "grad_norm"])
def test_figures_are_those_of_one_process_on_every_rank(report, world, name, variant, figure):
    want = [getattr(r, figure) for r in alone(world, name, variant)[0]]
    rel = tolerance(name, variant, 1e-4 if figure == "grad_norm" else LOSS)
    for got in report(world).everywhere(f"training/{name}/{variant}/{figure}"):
        np.testing.assert_allclose(got, want, rtol=rel)
    by_domain = model(name).moe.gate.row_domains > 1
    # without logits there is nothing for a z-loss
    assert want[-1] != want[0] or (by_domain and figure == "z_loss")


def test_rewards_are_those_of_one_process(report):
    """Log-probabilities under the reference too, of which each rank computes its part."""
    world, name, variant = next(case for case in CASES if dpo(case[2]) is not None)
    want = np.array([list(r.preference.values()) for r in alone(world, name, variant)[0]])
    assert want[0, 0] == pytest.approx(np.log(2), rel=LOSS), "the reference is where it begins"
    for got in report(world).everywhere(f"training/{name}/{variant}/preference"):
        found = got.copy()
        found[0, 4] = want[0, 4]  # margins of 0 but for rounding, which decides which is larger
        # log-ratios are differences of sums of eight logarithms of about 4
        np.testing.assert_allclose(found, want, rtol=LOSS, atol=LOSS * 32)
    assert want[-1, 3] > 0.01, "margins grow"


def test_a_stage_is_that_of_one_process(report):
    """Lifelong-MoE: the distance from the model before, and not a bit of a frozen expert moves, of
    which one rank has all of its experts and the other one a single one.
    """
    world, name, variant = next(case for case in CASES if "held" in case[2])
    want = [result.distillation for result in alone(world, name, variant)[0]]
    assert min(want) > 1e-3
    for got in report(world).everywhere(f"training/{name}/{variant}/distillation"):
        np.testing.assert_allclose(got, want, rtol=LOSS)
    topology, layout = Topology.of(LAYOUTS[world][name]), by_name(specs(model(name)))
    for rank, arrays in enumerate(report(world).ranks):
        for path, got in held(arrays, f"training/{name}/{variant}/weights/").items():
            spec = layout[path]
            if not spec.frozen_rows:
                continue
            drawn = init_values(spec, 0)[weight_slice(spec, topology, rank)]
            frozen = FROZEN if "router" in path else max(0, FROZEN - rank * len(got))
            moved = [(a != b).any() for a, b in zip(got, drawn, strict=True)]
            assert moved == [number >= frozen for number in range(len(got))], path


@each_case
def test_gradient_norms_count_every_element_once(report, world, name, variant):
    results = alone(world, name, variant)[0]
    for rank in report(world).ranks:
        for path, got in held(rank, f"training/{name}/{variant}/norms/").items():
            want = [result.gradient_norms[path] for result in results]
            rel, small = tolerance(name, variant, NORMS), 1e-7
            if "float16" in variant:
                rel = 4 * rel  # a norm's few gradients: 6.7e-4 measured
            np.testing.assert_allclose(got, want, rtol=rel, atol=small if rel else 0)


@each_case
def test_choices_are_counted_over_all_ranks(report, world, name, variant):
    results = alone(world, name, variant)[0]
    for figure in ("routed_LE", "kept_LE"):
        want = np.array([getattr(r, figure) for r in results])
        for got in report(world).everywhere(f"training/{name}/{variant}/{figure}"):
            np.testing.assert_array_equal(got, want)


@each_case
def test_weights_end_where_one_process_ends(report, world, name, variant):
    want = alone(world, name, variant)[1]
    topology, found = Topology.of(LAYOUTS[world][name]), set()
    layout = by_name(specs(model(name)))
    for rank, arrays in enumerate(report(world).ranks):
        for path, got in held(arrays, f"training/{name}/{variant}/weights/").items():
            values = want[path][weight_slice(layout[path], topology, rank)]
            assert got.shape == values.shape, path
            difference = np.linalg.norm(got.astype(np.float64) - values)
            limit = tolerance(name, variant, WEIGHTS) * np.linalg.norm(values.astype(np.float64))
            assert difference <= limit, (path, rank)
            found.add(path)
    assert found == set(want)


@each_case
def test_each_stage_holds_its_own_weights_only(report, world, name, variant):
    """And the first and the last one a tied embedding."""
    want = alone(world, name, variant)[1]
    pp = LAYOUTS[world][name].pp
    stages = [
        set(held(arrays, f"training/{name}/{variant}/weights/")) for arrays in report(world).ranks
    ]
    first = stages[:: world // pp]
    assert len(first) == pp
    twice = {"embed_tokens.weight"} if name in TIED and pp > 1 else set()
    assert sum(map(len, first)) == len(want) + len(twice)
    assert twice <= first[0] & first[-1]


def kept(path, variant):
    """How many tensors an optimizer keeps of a weight: two means, and a master of 16 bits; of a
    matrix inside the model, Muon's buffer.
    """
    ends = ("embed_tokens.weight", "lm_head.weight", "norm.weight")
    if "muon" in variant:
        return 2 if path.endswith(ends) else 1
    return 3 if "float16" in variant else 2


@pytest.mark.parametrize(
    ("world", "name", "variant"),
    [(world, name, variant) for world, name, variant in CASES if "zero1" in name],
)
def test_optimizer_state_is_shared_out(report, world, name, variant):
    """Together the ranks keep what one keeps otherwise, experts apart, of which each has its own;
    and none keeps much more than its share.
    """
    layout = LAYOUTS[world][name]
    want = alone(world, name, variant)[1]
    layers = by_name(specs(model(name)))
    whole = sum(
        kept(path, variant) * values.size
        for path, values in want.items()
        if layers[path].kind == "trained"
    )
    sizes = [int(size) for size in report(world).everywhere(f"training/{name}/{variant}/state")]
    assert sum(sizes) == whole
    assert max(sizes) <= 1.1 * whole / layout.dp


def test_something_was_dropped_clipped_and_learnt():
    results = alone(2, "dp2 ep2 interleaved", "plain")[0]
    assert sum(r.dropped_fraction for r in results) > 0
    assert max(r.grad_norm for r in results) > 0.5
    assert results[-1].lm_loss < results[0].lm_loss


@pytest.mark.parametrize("case", [case for case in CASES if case[1] in WATCHED])
def test_outputs_of_all_layers_are_those_of_one_process(report, case):
    """Of all rows, and of the layers of all stages."""
    world, name, _ = case
    outputs = alone(*case)[4]
    assert len(outputs) == 1 + model(name).num_hidden_layers
    # of float16 the next number: 2^-10, twice its rounding
    rel = 2 * HALF if "float16" in case[2] else WEIGHTS
    for number, want in enumerate(outputs):
        for largest, mean, broken in report(world).everywhere(f"watched/{name}/{number}"):
            assert largest == pytest.approx(want["largest"], rel=rel)
            assert mean == pytest.approx(want["mean"], rel=rel)
            assert broken == want["not_finite"] == 0


@pytest.mark.parametrize("case", [case for case in CASES if case[1] in WATCHED])
def test_the_report_of_a_failed_step_names_what_another_rank_holds(report, case):
    world, name, _ = case
    found = json.loads(str(report(world).get(0, f"watched/{name}/failure")))
    last = model(name).num_hidden_layers - 1
    broken = {each["name"]: each["not_finite"] > 0 for each in found["layers"]}
    names = ["embedding", *(f"layer {number}" for number in range(last + 1))]
    assert broken == {each: each == f"layer {last}" for each in names}
    weights = {each["name"]: each["not_finite"] for each in found["weights"]}
    whole = by_name(specs(model(name)))
    assert set(weights) == set(whole)
    w1 = f"layers.{last}.moe.experts.w1"
    experts, size, _ = whole[w1].shape
    layout = LAYOUTS[world][name]
    here = experts // layout.ep * (size // layout.mp)
    assert {name: count for name, count in weights.items() if count} == {w1: here}
    normed = {each["name"] for each in found["weights"] if each["gradient_norm"] is not None}
    assert normed == {path for path, spec in whole.items() if spec.kind == "trained"}
