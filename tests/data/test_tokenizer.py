import functools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pgolf.data.tokenizer import CASE_OPERATORS, SPACE, ByteTable, Tokenizer, train_tokenizer
from pgolf.errors import DataError, UserError

COMMUNITY = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
NAMES = ["fineweb_8192_bpe.model", "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"]

# All of Unicode that UTF-8 can carry, with what makes trouble drawn more often.
TROUBLE = [
    SPACE,
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\0",
    "\ufeff",
    "\ufffd",
    "e\u0301",
    "👩‍👩‍👧‍👦",
    "\u200b",
    "\x7f",
    "<s>",
    "<unk>",
    "<0x41>",
    "ﬁ",
]
TEXTS = st.lists(
    st.one_of(st.sampled_from(TROUBLE), st.sampled_from(["def", " the", "self", "    ", "2024"]), st.text(max_size=8))
).map("".join)
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


byte_table = functools.lru_cache(Tokenizer.byte_table)


def counted_bytes(tokenizer: Tokenizer, ids: list[int]) -> int:
    """Bytes of a document, each token after the one before it, the first after the document's beginning."""
    targets = torch.tensor(ids, dtype=torch.int64)
    previous = torch.tensor([tokenizer.bos_id, *ids], dtype=torch.int64)[: len(ids)]
    return int(byte_table(tokenizer).count(targets, previous).sum())


@RELAXED
@given(text=TEXTS)
@example(text="")
@example(text=" ")
@example(text=SPACE * 3)
@example(text="\n  \n")
@example(text=" a")
@example(text="\0")
def test_counted_bytes_are_the_utf8_length_of_the_decoded_text(tokenizer, text):
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(ids)
    assert decoded == text.replace(SPACE, " ")  # the one character that does not come back
    assert counted_bytes(tokenizer, ids) == len(decoded.encode("utf-8"))


@RELAXED
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_counted_bytes_of_documents_in_a_row(tokenizer, texts):
    ids = [token for text in texts for token in [tokenizer.bos_id, *tokenizer.encode(text)]]
    assert counted_bytes(tokenizer, ids) == sum(len(text.replace(SPACE, " ").encode("utf-8")) for text in texts)


@pytest.mark.parametrize("name", NAMES)
@RELAXED
@given(text=TEXTS)
def test_counted_bytes_with_the_community_tokenizers(name, text):
    tokenizer = community(name)
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(ids)
    if "caseops" in name:
        decoded = "".join(character for character in decoded if character not in CASE_OPERATORS)
    assert counted_bytes(tokenizer, ids) == len(decoded.encode("utf-8"))


_loaded: dict[str, Tokenizer] = {}


def community(name: str) -> Tokenizer:
    if not (COMMUNITY / name).is_file():
        pytest.skip(f"no {COMMUNITY / name}")
    return _loaded.setdefault(name, Tokenizer(COMMUNITY / name))


def test_facts_of_the_community_tokenizers():
    plain, case = community(NAMES[0]), community(NAMES[1])
    assert (plain.bos_id, plain.vocab_size) == (case.bos_id, case.vocab_size) == (1, 8192)
    assert plain.byte_table().base_bytes[4:8].tolist() == [1, 1, 1, 1]
    assert case.byte_table().base_bytes[4:8].tolist() == [0, 0, 0, 0]


def test_the_table_by_hand(tokenizer):
    table = tokenizer.byte_table()
    assert table.base_bytes.dtype == torch.int64
    assert table.base_bytes.shape == table.has_leading_space.shape == table.is_boundary.shape == (1024,)
    assert table.is_boundary.nonzero().flatten().tolist() == [0, 1, 2, 3]  # pad, bos, eos, unk
    assert table.base_bytes[:4].tolist() == [0, 0, 0, 0]
    assert table.base_bytes[4:260].tolist() == [1] * 256  # byte pieces
    (the,) = tokenizer.encode("the")
    assert tokenizer.decode([5, the]) == "\x01 the"
    assert table.count(torch.tensor([the]), torch.tensor([tokenizer.bos_id])).item() == 3
    assert table.count(torch.tensor([the]), torch.tensor([the])).item() == 4
    spaces = tokenizer.encode("x" + " " * 4)[-1]
    assert table.count(torch.tensor([spaces]), torch.tensor([the])).item() == 4  # one byte each, not three


def test_count_keeps_the_shape_and_skips_padding():
    table = ByteTable(torch.tensor([0, 2, 3]), torch.tensor([False, True, False]), torch.tensor([True, False, False]))
    targets = torch.tensor([[1, 1], [2, -100]], dtype=torch.int32)
    previous = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    counted = table.to("cpu").count(targets, previous)
    assert counted.tolist() == [[2, 3], [3, 0]]
    assert counted.dtype == torch.int64


def test_documents_encode_as_one_by_one(tokenizer):
    texts = ["def f():\n    return 1", "", "Zoë 🎉"]
    assert tokenizer.encode_documents(texts) == [tokenizer.encode(text) for text in texts]


def test_training_is_deterministic_and_quiet(tmp_path, demo, capfd):
    documents = [
        "The quick brown fox jumps over the lazy dog 12345. " * 3,
        *map(chr, range(33, 127)),
        "line\n\n    code",
    ]
    first = train_tokenizer(documents, 400, tmp_path / "a.model")
    second = train_tokenizer(iter(documents), 400, tmp_path / "b.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert first.sha256 == second.sha256
    assert first.vocab_size == 400
    assert capfd.readouterr() == ("", "")


def test_digits_are_split(tokenizer):
    assert tokenizer.encode("20240520")[-8:] == [tokenizer.encode(f"x{digit}")[-1] for digit in "20240520"]


@pytest.mark.parametrize(
    ("documents", "vocab_size", "error", "message"),
    [
        (["a b c"], 2000, DataError, "5 bytes of text cannot fill 2000 pieces"),
        ([], 1024, DataError, "0 bytes of text cannot fill 1024 pieces"),
        (["\0"], 1024, DataError, "cannot fill"),
        ([chr(c) for c in range(0x4E00, 0x4E00 + 500)], 512, DataError, "fewer than this text has characters"),
        (["text"], 100, UserError, "accepted are 320 to 65536"),
        (["text"], 65537, UserError, "accepted are 320 to 65536"),
    ],
)
def test_text_and_vocabulary_that_do_not_fit(tmp_path, documents, vocab_size, error, message):
    with pytest.raises(error, match=message):
        train_tokenizer(documents, vocab_size, tmp_path / "x.model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"hello", bytes(1000), b"\x0a\xff\xff\xff\x7f" * 9])
def test_what_is_not_a_model_is_refused_by_name(tmp_path, content, capfd):
    path = tmp_path / "x.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a SentencePiece model") as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_model_cut_short_is_refused(tmp_path, demo):
    model = demo.tokenizer_path.read_bytes()
    (tmp_path / "cut.model").write_bytes(model[: len(model) // 2])
    with pytest.raises(DataError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "cut.model")
    with pytest.raises(DataError, match="No such file"):
        Tokenizer(tmp_path / "none.model")
