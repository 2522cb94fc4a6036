"""Texts as tokens from which exactly the same text comes back."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from train_gpt import WORD_MARK, ByteTable, restore_case


def kept_as_is(table: ByteTable, character: str) -> bool:
    """Whether the tokenizer neither changes a character nor spells it in byte pieces."""
    sp = table.processor
    text = f"a{character}a"
    tokens = sp.encode(text)
    spelled = any(sp.is_byte(token) or sp.is_unknown(token) for token in tokens)
    return sp.decode(tokens) == text and not spelled


def tokens_of(text: str, table: ByteTable) -> list[int]:
    """Tokens from which `text_of` gives exactly this text.

    What the tokenizer would change goes in as byte pieces.
    """
    if not table.processor:
        return table.encode(text)
    marked = table.marked_text(text)
    pieces = [table.processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]

    def byte_pieces(part: str) -> list[int]:
        return [pieces[byte] for byte in part.encode()]

    changed = [c for c in sorted(set(marked)) if c == " " or not kept_as_is(table, c)]
    word = f"[^ {re.escape(''.join(changed))}]+"
    tokens = []
    at = 0
    for words in re.finditer(f"{word}(?: {word})*", marked):
        tokens += byte_pieces(marked[at : words.start()])
        tokens += table.processor.encode(words[0])
        at = words.end()
    tokens += byte_pieces(marked[at:])
    return tokens if text_of(tokens, table) == text.encode() else byte_pieces(marked)


def text_of(tokens: Sequence[int], table: ByteTable) -> bytes:
    """The bytes of tokens, as many as the table counts.

    A word mark is no space at the start or after a control token. If the tokenizer begins every
    text with a mark, neither is one after a byte piece, where `tokens_of` begins anew.
    """
    if not table.processor:
        return table.decode(tokens)
    sp = table.processor
    begins_with_mark = sp.id_to_piece(sp.encode("a")[0]).startswith(WORD_MARK)
    parts = []
    bare = True  # a mark here is no space
    for token in map(int, tokens):
        piece = sp.id_to_piece(token)
        if sp.is_byte(token):
            parts.append(bytes([int(piece[3:5], 16)]))
            bare = begins_with_mark
        elif table.boundary[token]:
            bare = True
        else:
            shown = piece.removeprefix(WORD_MARK) if bare else piece
            parts.append(shown.replace(WORD_MARK, " ").encode())
            bare = False
    text = b"".join(parts)
    if table.markers:  # what is no UTF-8, where a document was cut, stays as it is
        return restore_case(text.decode(errors="surrogateescape")).encode(errors="surrogateescape")
    return text


def documents_of(tokens: np.ndarray, table: ByteTable, bos: int) -> bytes:
    """Text of tokens that begin with a document start.

    Documents end in a newline, but for the last.
    """
    parts = np.split(tokens, np.flatnonzero(tokens == bos))[1:]
    return b"\n".join(text_of(part[1:], table) for part in parts)
