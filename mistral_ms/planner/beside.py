"""What the planner says of one rank, beside what its compiled graph says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mistral_ms.config import RunConfig
from mistral_ms.parallel.memory import FLOAT
from mistral_ms.parallel.pipeline import stages_of
from mistral_ms.planner.memory import MEANS, parameters
from mistral_ms.planner.sent import Sent, step_bytes
from mistral_ms.weights import specs


def planned_beside(
    run: RunConfig, report: Mapping[str, Any], layers: int | None = None
) -> dict[str, Any]:
    """The planner's numbers for the rank of a dry run's report.

    Args:
        run: that was compiled.
        report: see :func:`mistral_ms.parallel.dryrun.report.report`.
        layers: of the model that was compiled; None: all.

    Returns:
        ``parameter_bytes``, ``optimizer_bytes`` (of AdamW), ``gradient_bytes``, and under
        ``communication`` each operator of either side: ``operator``, ``phase``, ``ranks``, and the
        bytes of a step, ``compiled`` and ``planned``.
    """
    model = run.model
    if layers is not None:
        model = model.model_copy(update={"num_hidden_layers": layers})
    run, weights = run.model_copy(update={"model": model}), specs(model)
    stage = stages_of(model, run.parallel.pp)[report["stage"]]
    held = parameters(model, run.parallel, (stage,), weights, "graph")
    compiled: Counter[Sent] = Counter()
    for line in report["communication"]:
        key = Sent(line["operator"], line["phase"], tuple(line["ranks"]))
        compiled[key] += line["bytes"] * line["count"]
    planned = step_bytes(run, report["rank"], (stage,), weights, "graph")
    return {
        "parameter_bytes": held.kept * FLOAT,
        "optimizer_bytes": held.owned * FLOAT * MEANS,
        "gradient_bytes": held.held * FLOAT * (run.training.gradient_accumulation_steps > 1),
        "communication": [
            {
                "operator": each.operator,
                "phase": each.phase,
                "ranks": list(each.ranks),
                "compiled": compiled[each],
                "planned": planned[each],
            }
            for each in dict.fromkeys((*compiled, *planned))
        ],
    }
