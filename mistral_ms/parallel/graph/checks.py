"""What the compiler would refuse without saying why, refused before it runs."""

from __future__ import annotations

from mistral_ms.config import RunConfig
from mistral_ms.errors import ConfigError


def check_run(run: RunConfig, layers: int) -> None:
    """Raises if the auto-parallel graph cannot express a run.

    Args:
        run: the run; its layout is legal already.
        layers: how many decoder blocks are built.

    Raises:
        ConfigError: names the value and the rule.
    """
    model, parallel, training = run.model, run.parallel, run.training
    rows = training.global_batch_size // training.micro_batches // parallel.dp
    tokens = rows * training.seq_length
    sparse = bool(model.sparse_layers)
    divided = parallel.world > 1
    for bad, where, value, rule, todo in (
        (
            divided and parallel.world % 8 and parallel.world not in (2, 4),
            "parallel",
            f"dp * mp * pp = {parallel.world}",
            "MindSpore divides a graph among 2, 4, or a multiple of 8 devices",
            None,
        ),
        (
            divided and (model.head_size % 16 or model.head_size > 512),
            "model.head_dim",
            model.head_size,
            "FlashAttentionScore takes heads of a multiple of 16, at most 512",
            None,
        ),
        (
            sparse and run.routing.policy != "capacity",
            "routing.policy",
            run.routing.policy,
            "a graph has static shapes: experts have a capacity",
            "set routing.policy=capacity",
        ),
        (
            sparse and training.aux_coef > 0 and run.routing.aux_loss == "pooled",
            "routing.aux_loss",
            "pooled",
            "the graph forms the load-balancing loss layer by layer",
            "set routing.aux_loss=per_layer or training.aux_coef=0",
        ),
        (
            model.tie_word_embeddings,
            "model.tie_word_embeddings",
            True,
            "embedding and head lie on different stages of the graph",
            None,
        ),
        (
            parallel.pp > layers,
            "layers",
            layers,
            f"every one of the {parallel.pp} pipeline stages holds a layer",
            None,
        ),
        (
            training.micro_batches < parallel.pp,
            "training.micro_batches",
            training.micro_batches,
            f"a pipeline of {parallel.pp} stages needs at least as many micro-batches",
            f"{4 * parallel.pp} keep it busy",
        ),
        (
            parallel.world == 1 and training.micro_batches > 1,
            "training.micro_batches",
            training.micro_batches,
            "the graph of one process takes its batch at once",
            "set training.micro_batches=1, or train with the train command",
        ),
        (
            parallel.pp > 1 and parallel.schedule != "1f1b",
            "parallel.schedule",
            parallel.schedule,
            "MindSpore's pipeline is 1f1b",
            None,
        ),
        (
            model.hidden_size % parallel.mp,
            "model.hidden_size",
            model.hidden_size,
            f"must be divisible by parallel.mp ({parallel.mp})",
            None,
        ),
        (
            tokens % parallel.mp,
            "training.seq_length",
            training.seq_length,
            f"the {tokens} tokens of a rank's micro-batch must be divisible by parallel.mp "
            f"({parallel.mp}): norms and residuals divide them",
            None,
        ),
    ):
        if bad:
            raise ConfigError("impossible graph", where=where, value=value, rule=rule, todo=todo)
