"""Whether the two forms of one vocabulary, tokenizer.json and tokenizer.model, say the same."""

from __future__ import annotations

from pathlib import Path

from sentencepiece import SentencePieceProcessor

from mistral_ms.errors import TokenizerError
from mistral_ms.tokenizer.backend import BackendTokenizer


def compare_files(
    tokenizer: BackendTokenizer, model: SentencePieceProcessor, path: Path
) -> tuple[str, ...]:
    """Compares every id; the tokenizer.json is the one that is used.

    Args:
        tokenizer: read from tokenizer.json.
        model: the sentencepiece model.
        path: its file.

    Returns:
        What differs without harm to texts: added tokens, and control tokens of another name.

    Raises:
        TokenizerError: an id stands for different texts.
    """
    size, renamed = int(model.get_piece_size()), []
    for i in range(size):
        theirs, ours = model.id_to_piece(i), tokenizer.name(i)
        if theirs == ours:
            continue
        if ours is None or not (model.is_control(i) or model.is_unused(i) or model.is_unknown(i)):
            raise TokenizerError(
                "contradicting tokenizer files",
                where=f"id {i}",
                value=f"{ours!r} in tokenizer.json ({tokenizer.vocab_size} ids), "
                f"{theirs!r} in {path} ({size} ids)",
                rule="both must hold the same vocabulary",
                todo="remove the file that is not the model's",
            )
        renamed.append(f"{i} is {ours!r}, not {theirs!r}")
    notes = []
    if tokenizer.vocab_size != size:
        notes.append(
            f"tokenizer.json has {tokenizer.vocab_size} ids, {path.name} {size}: "
            "tokenizer.json is used"
        )
    if renamed:
        shown = ", ".join(renamed[:4]) + (", ..." if len(renamed) > 4 else "")
        notes.append(f"tokenizer.json is used, in which {shown}, as {path.name} says")
    return tuple(notes)
