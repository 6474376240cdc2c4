"""From ids to text, one id at a time: text is given out as soon as it is certain, never sooner.

A character outside the vocabulary is spelt as the bytes of its UTF-8 form, one id each. Until the
last of them has come there is nothing to show; and whether the bytes form a character at all is
known only then. The rules are those of sentencepiece's own decoder:

* control tokens have no text (or their name, on request), an unknown id is shown as " ⁇ ";
* the space that encoding put before the text is taken away;
* in a run of byte tokens each well-formed UTF-8 character is shown; a byte that belongs to none
  becomes one replacement character U+FFFD, and reading goes on behind it.

In a byte-level vocabulary all text is such a run, and the beginning of a character that does not go
on becomes one replacement character, however many bytes it has (the Unicode standard's practice).
"""

from __future__ import annotations

from collections.abc import Sequence

from mistral_ms.tokenizer.base import UNKNOWN_TEXT, PieceKind, Tokenizer

REPLACEMENT = "\ufffd"


class StreamDecoder:
    """Decodes a growing sequence; each push costs the same, however long the text is by now.

    The pushes and the flush, joined, are exactly ``tokenizer.decode`` of all ids.

    Args:
        tokenizer: whose ids they are.
        skip_special: leave control tokens out; otherwise their names are shown.
        context: ids that come before, whose text is shown already, such as the prompt that a model
            continues: then a first space belongs to the text and is kept.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special: bool = True, context: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._drop_space = tokenizer.drops_first_space
        self._bytes = bytearray()  # of a character that is not complete yet
        for token_id in context:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Takes the next id.

        Returns:
            The text that has become certain; often empty inside a byte sequence.

        Raises:
            TokenizerError: a negative id.
        """
        piece = self._tokenizer.piece(token_id)
        if piece.kind is PieceKind.BYTE:
            self._bytes += piece.data
            text = self._complete_characters()
            self._drop_space = self._drop_space and not text
            return text
        before = self.flush()
        self._drop_space = self._drop_space and not before
        return before + self._text_of(piece.kind, piece.text)

    def flush(self) -> str:
        """The sequence ends here: what waits for further bytes will not become a character."""
        waiting = bytes(self._bytes)
        self._bytes.clear()
        if self._tokenizer.byte_level:
            return waiting.decode("utf-8", "replace")
        return REPLACEMENT * len(waiting)

    def _text_of(self, kind: PieceKind, text: str) -> str:
        if kind is PieceKind.CONTROL:
            text = "" if self._skip_special else text
        elif kind is PieceKind.UNKNOWN:
            text = UNKNOWN_TEXT
        elif self._drop_space and text.startswith(" "):
            self._drop_space = False
            return text[1:]
        self._drop_space = self._drop_space and not text
        return text

    def _complete_characters(self) -> str:
        """Takes complete characters, and bytes that cannot begin one, off the waiting bytes."""
        text = ""
        while self._bytes:
            length = _utf8_length(self._bytes[0])
            continued = all(byte & 0xC0 == 0x80 for byte in self._bytes[1:length])
            if len(self._bytes) < length and continued:
                break  # may still become a character
            try:
                text += self._bytes[:length].decode("utf-8")
                del self._bytes[:length]
            except UnicodeDecodeError as error:
                text += REPLACEMENT
                del self._bytes[: error.end if self._tokenizer.byte_level else 1]
        return text


def _utf8_length(lead: int) -> int:
    """Bytes of the UTF-8 character that begins with ``lead``; 1 for a byte that begins none."""
    if 0xC2 <= lead <= 0xDF:
        return 2
    if 0xE0 <= lead <= 0xEF:
        return 3
    if 0xF0 <= lead <= 0xF4:
        return 4
    return 1


def decode_ids(tokenizer: Tokenizer, ids: Sequence[int], skip_special: bool = True) -> str:
    """The text of a whole sequence, by the same rules.

    Raises:
        TokenizerError: a negative id.
    """
    stream = StreamDecoder(tokenizer, skip_special)
    return "".join([*(stream.push(token_id) for token_id in ids), stream.flush()])
