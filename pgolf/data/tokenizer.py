"""SentencePiece tokenizers and the number of UTF-8 bytes that each token stands for.

Bits per byte divides by the bytes of the *decoded* text, counted from the pieces:

    bytes(target | previous) = base(target) + leading(target) * (1 - boundary(previous))

A byte piece has base 1. Control, unknown and unused pieces have base 0 and are boundaries. Of any other piece a leading
U+2581 ("▁", SentencePiece's space) is set aside as `leading`, and the base is the UTF-8 length of the rest, where
a further U+2581 is again one space and so one byte. After a boundary the leading space is the one that SentencePiece
puts before every text and takes away when decoding, so it counts nothing.

With tokenizers made by `train_tokenizer` the sum over a document equals the UTF-8 length of `decode(encode(text))`,
and that is the text itself but for one character: SentencePiece cannot tell a U+2581 in the text from a space, so it
comes back as a space and counts 1 byte, not 3. The community's models normalise (NFKC, runs of spaces become
one), so for them too the count is the length of the decoded, not of the original, text.

The community's CaseOps models write capitals as an operator before a small letter: four pieces, U+E001 to U+E004, right
after the control pieces. They stand for no bytes of the original text and have base 0; exact counts are in the byte
sidecar that comes with such data.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from pgolf.errors import DataError, UserError
from pgolf.runtime.files import read_file, replacing

SPACE = "\u2581"
CASE_OPERATORS = ["\ue001", "\ue002", "\ue003", "\ue004"]
MIN_VOCAB_SIZE = 320  # 4 control pieces, 256 byte pieces and some characters
MAX_VOCAB_SIZE = 65536  # tokens are stored as uint16
TRAINING_BYTES = 64_000_000
MODEL_BYTES = 64_000_000  # of a model file, at most; one of 65,536 pieces has 2 MB


@dataclass(frozen=True)
class ByteTable:
    """What `count` needs to know of each of V pieces."""

    base_bytes: Tensor  # (V,) int64
    has_leading_space: Tensor  # (V,) bool
    is_boundary: Tensor  # (V,) bool

    def to(self, device: torch.device | str) -> "ByteTable":
        """The same table on `device`."""
        return ByteTable(self.base_bytes.to(device), self.has_leading_space.to(device), self.is_boundary.to(device))

    def count(
        self,
        targets: Tensor,  # any shape, integer token ids; negative ids mark padding and count 0 bytes
        previous: Tensor,  # same shape, the token before each target
    ) -> Tensor:
        """Bytes of each target: int64 of the same shape."""
        present = targets >= 0
        ids = targets.clamp(min=0).long()
        spaces = self.has_leading_space[ids] & ~self.is_boundary[previous.clamp(min=0).long()]
        return (self.base_bytes[ids] + spaces) * present


class Tokenizer:
    """A SentencePiece model file. `DataError` names a file that is missing or is not such a model."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            model = read_file(self.path, MODEL_BYTES)
        except OSError as error:
            raise DataError(f"cannot read tokenizer {path}: {error.strerror}") from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            vocab_size = self._model.vocab_size() if model else 0  # no bytes at all parse as an empty model
        except (RuntimeError, ValueError, TypeError):
            vocab_size = 0
        if vocab_size <= 0:
            raise DataError(f"{path}: not a SentencePiece model ({len(model)} bytes); a *.model file is needed")
        self.vocab_size: int = vocab_size
        self.bos_id: int = self._model.bos_id()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without a beginning-of-document token."""
        return self._model.encode(text)

    def encode_documents(self, documents: list[str], threads: int = 1) -> list[list[int]]:
        """Token ids of each document, as `encode` gives them."""
        return self._model.encode(documents, num_threads=threads)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; control tokens such as the beginning of a document give nothing."""
        return self._model.decode(ids)

    def byte_table(self) -> ByteTable:
        """Bytes of every piece, on the CPU."""
        base = torch.zeros(self.vocab_size, dtype=torch.int64)
        leading = torch.zeros(self.vocab_size, dtype=torch.bool)
        boundary = torch.zeros(self.vocab_size, dtype=torch.bool)
        model = self._model
        operators = range(4, 8)
        if self.vocab_size < 8 or [model.id_to_piece(token) for token in operators] != CASE_OPERATORS:
            operators = range(0)
        for token in range(self.vocab_size):
            if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
                boundary[token] = True
            elif token in operators:
                base[token] = 0
            elif model.is_byte(token):
                base[token] = 1
            else:
                piece = model.id_to_piece(token)
                leading[token] = piece.startswith(SPACE)
                base[token] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode("utf-8"))
        return ByteTable(base, leading, boundary)


def train_tokenizer(documents: Iterable[str], vocab_size: int, path: str | os.PathLike[str]) -> Tokenizer:
    """Train a byte-pair tokenizer of exactly `vocab_size` pieces on `documents` and save it as `path`.

    As the community's: pad, bos, eos, unk are 0 to 3, then 256 byte pieces, split digits, character coverage 0.999.
    Unlike them nothing is normalised, so that text comes back as it was: no NFKC, runs of spaces and line ends stay
    (and become pieces), and a space is put before each text so that a first space of its own is not lost.
    Deterministic: one thread, no sampling but this: of more than 64 MB evenly spaced documents are taken.
    `DataError` when the text is too little for the vocabulary.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"vocabulary of {vocab_size} pieces; accepted are {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}")
    documents = _evenly_spaced(documents if isinstance(documents, Sequence) else list(documents))
    text_bytes = sum(len(document.encode("utf-8")) for document in documents)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            shuffle_input_sentence=False,
            num_threads=1,
            max_sentence_length=1 << 30,
            minloglevel=4,
        )
    except RuntimeError as error:
        if "required_chars" in str(error):
            raise DataError(f"{vocab_size} pieces are fewer than this text has characters; ask for more") from None
        raise DataError(
            f"{text_bytes} bytes of text cannot fill {vocab_size} pieces; give more text or ask for fewer"
        ) from None
    with replacing(path) as file:
        file.write(model.getvalue())
    return Tokenizer(path)


def _evenly_spaced(documents: Sequence[str]) -> list[str]:
    """All documents, or every k-th such that about `TRAINING_BYTES` remain."""
    characters = sum(map(len, documents))
    return list(documents[:: max(1, -(-characters // TRAINING_BYTES))])
