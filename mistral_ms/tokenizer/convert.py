"""A sentencepiece model as a tokenizer of the tokenizers library, as transformers converts it.

Sentencepiece itself knows no added tokens and reads no control tokens in a text. Where either is
needed, the library's merging of pairs takes its place: the same pieces, with a rule for every way
to make one of two others, in the order of the pieces' scores.
"""

from __future__ import annotations

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mistral_ms.tokenizer.base import WORD_START
from mistral_ms.tokenizer.settings import TokenizerSettings


def to_backend(model: SentencePieceProcessor, settings: TokenizerSettings) -> Backend:
    """Converts a byte-pair model, in about a second for 32000 pieces.

    Args:
        model: of a Llama or Mistral model: byte-pair encoding with byte fallback.
        settings: ``legacy`` and ``add_prefix_space`` say where a space is put before text.
    """
    size = int(model.get_piece_size())
    names = [model.id_to_piece(i) for i in range(size)]
    ids = {name: i for i, name in enumerate(names)}
    backend = Backend(
        models.BPE(
            ids,
            _merges(model, names, ids),
            unk_token=model.id_to_piece(model.unk_id()),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    special = {i for i in range(size) if model.is_control(i)} | {model.unk_id()}
    for i in sorted(special):
        backend.add_special_tokens([AddedToken(names[i], special=True, normalized=False)])
    prefix = settings.add_prefix_space is not False
    if settings.legacy:
        steps = [normalizers.Prepend(WORD_START)] if prefix else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", WORD_START)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            WORD_START, prepend_scheme="first" if prefix else "never", split=False
        )
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(WORD_START, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(
    model: SentencePieceProcessor, names: list[str], ids: dict[str, int]
) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a third, the pair that sentencepiece joins first in front."""
    pairs = []
    for i, name in enumerate(names):
        halves = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        known = [(a, b) for a, b in halves if a in ids and b in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        score = model.get_score(i)
        pairs += [(score, len(a), len(b), a, b) for a, b in known]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [(a, b) for *_, a, b in pairs]
