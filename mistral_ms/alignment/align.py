"""The whole comparison: prompts, the oracle, our side."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mistral_ms.alignment.compare import TOLERANCE, Comparison, compare
from mistral_ms.alignment.hugging_face import run_hugging_face
from mistral_ms.checkpoint import Source, open_checkpoint
from mistral_ms.checkpoint.adapters import open_adapter
from mistral_ms.checkpoint.load import kept_quantization
from mistral_ms.config import DType, ModelConfig, ParallelConfig
from mistral_ms.errors import CheckpointError, GenerationError, TokenizerError
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.tokenizer import check_vocabulary, load_tokenizer

DEFAULT_PROMPTS = (
    "The mixture of experts",
    "Eight workshops share the work of the harbour, but each parcel visits only two of them. "
    "Which two, the dispatcher decides",
    "def fibonacci(n: int) -> int:\n    ",
    "1, 1, 2, 3, 5, 8,",
)

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "expert_size",
    "shared_expert_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_size",
    "num_hidden_layers",
    "sparse_layers",
)


def align(
    hf_path: Path,
    our_path: Path | None = None,
    *,
    prompts: Sequence[str] | None = None,
    ids: Sequence[Sequence[int]] | None = None,
    new_tokens: int = 64,
    tolerance: float = TOLERANCE,
    kind: str | None = None,
    verify: bool = True,
    follow_links: bool = False,
    say: Callable[[str], None] = lambda text: None,
    parallel_context: ParallelContext | None = None,
    adapter: Path | None = None,
    dtype: DType = "float32",
) -> Comparison | None:
    """Runs prompts through Hugging Face (torch) and through us, and compares.

    Args:
        hf_path: a Hugging Face directory, the oracle.
        our_path: a checkpoint of any known format; ``hf_path`` itself when None.
        prompts: texts. By default four short ones; when the directory has no tokenizer that can
            be used, random token ids of the same lengths.
        ids: token ids instead of texts; the directory's tokenizer is then not looked at.
        new_tokens: greedy tokens to compare.
        tolerance: allowed difference as a share of the largest logit; with bfloat16 what Hugging
            Face's own rounding allows, if that is more, see :class:`Comparison`.
        kind: which format to take when ``our_path`` holds several.
        verify: compare a checkpoint of ours with its digests while it is read.
        follow_links: links may lead out of both directories; see :func:`open_checkpoint`.
        say: told what is being done.
        parallel_context: this process's part of several, which must all call this; Hugging Face's
            side runs on the first one alone.
        adapter: directory of an adapter, for both sides; the peft library must be installed.
        dtype: of weights and activations on both sides; on CPU ours computes in bfloat16 with
            weights of that dtype and activations in float32.

    Returns:
        The comparison; None on all processes but the first.

    Raises:
        CheckpointError: a directory that cannot be read, or two models of different sizes.
        TokenizerError: prompts were given, and there is no tokenizer or one that cannot be used.
        GenerationError: a prompt that is empty or longer than the model's positions.
    """
    ours = our_path or hf_path
    with (
        open_checkpoint(ours, kind, verify=verify, follow_links=follow_links) as source,
        open_checkpoint(hf_path, "hf", follow_links=follow_links) as theirs,
    ):
        config = source.config
        _check_oracle(theirs)
        world = 1 if parallel_context is None else parallel_context.world
        kept = adapter is None and kept_quantization(source, dtype, world) is not None
        for remark in dict.fromkeys((theirs.remark(), source.remark(kept))):
            if remark:
                say(remark)
        _check_comparable(theirs.config, config, ours)
        if adapter is not None:
            say(f"adapter on both sides: {adapter}")
            open_adapter(adapter, config, verify=verify, follow_links=follow_links).close()
    if ids is None:
        ids = _prompt_ids(hf_path, config, prompts, say)
    else:
        _check_ids(ids, config)
    longest = max(map(len, ids))
    if longest > config.longest_sequence:
        raise GenerationError("prompt too long", value=f"{longest} tokens", rule=config.length_rule)
    room = config.longest_sequence - longest
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic":
        # beyond, transformers changes the base with every token and keeps the old tokens' keys
        room = max(0, config.max_position_embeddings - longest)
        if room < new_tokens:
            say(f"dynamic rope_scaling: {room} new tokens, to max_position_embeddings, compared")
    new_tokens = min(new_tokens, room)
    say(f"Hugging Face: {sum(map(len, ids))} tokens in {len(ids)} prompts, {new_tokens} new each")
    parallel_context = (
        ParallelContext(ParallelConfig()) if parallel_context is None else parallel_context
    )
    oracle = parallel_context.on_rank_0(
        lambda: run_hugging_face(hf_path, ids, new_tokens, say, adapter, dtype)
    )
    gc.collect()  # both models at once might not fit
    say("mistral_ms: the same")
    from mistral_ms.alignment.ours import run_ours

    side = run_ours(
        ours,
        ids,
        new_tokens,
        kind,
        parallel_context,
        verify=verify,
        follow_links=follow_links,
        adapter=adapter,
        dtype=dtype,
    )
    return None if oracle is None else compare(oracle, side, tolerance)


def _check_oracle(theirs: Source) -> None:
    """Raises if transformers would compute with packages of others."""
    if theirs.quantization is not None:
        raise CheckpointError(
            "quantised weights",
            where=theirs.path,
            value=theirs.quantization,
            rule="Hugging Face's side needs weights in float32, float16 or bfloat16",
            todo="convert it --to hf, which dequantises it, and compare with that",
        )


def _check_comparable(oracle: ModelConfig, ours: ModelConfig, where: Path) -> None:
    """Models whose tensors differ in shape cannot be compared layer by layer."""
    for key in SIZES:
        if getattr(oracle, key) != getattr(ours, key):
            raise CheckpointError(
                "not the same model",
                where=f"{where}: {key}",
                value=getattr(ours, key),
                rule=f"Hugging Face's has {getattr(oracle, key)}",
            )
    if (oracle.moe and ours.moe) and (
        oracle.moe.num_local_experts != ours.moe.num_local_experts
        or oracle.moe.num_experts_per_tok != ours.moe.num_experts_per_tok
    ):
        raise CheckpointError(
            "not the same model", where=f"{where}: moe", value=ours.moe, rule=f"not {oracle.moe}"
        )


def _prompt_ids(
    path: Path,
    config: ModelConfig,
    prompts: Sequence[str] | None,
    say: Callable[[str], None],
) -> list[list[int]]:
    if prompts is not None and not prompts:
        raise GenerationError("no prompts", rule="at least one")
    try:
        tokenizer = load_tokenizer(path)
        check_vocabulary(tokenizer, config)
    except TokenizerError as error:
        if prompts is not None:
            raise
        say(f"no tokenizer that could be used, random token ids instead of texts ({error})")
        stream = np.random.default_rng(0)
        lengths = [min(n, config.longest_sequence) for n in (5, 29, 13, 12)]
        return [stream.integers(0, config.vocab_size, n).tolist() for n in lengths]
    texts = DEFAULT_PROMPTS if prompts is None else prompts
    ids = [tokenizer.encode(text, bos=tokenizer.adds_bos) for text in texts]
    _check_ids(ids, config)
    return ids


def _check_ids(ids: Sequence[Sequence[int]], config: ModelConfig) -> None:
    if not ids:
        raise GenerationError("no prompts", rule="at least one")
    for number, prompt in enumerate(ids):
        outside = [i for i in prompt if not 0 <= i < config.vocab_size]
        if outside or not prompt:
            raise GenerationError(
                "token id outside the vocabulary" if outside else "empty prompt",
                where=f"prompt {number}",
                value=outside[0] if outside else None,
                rule=f"0 to {config.vocab_size - 1}" if outside else "at least one token",
            )
