"""How an artifact wants to be scored: the `scoring` of its metadata, which anybody may have written."""

from reprlib import repr as shortened
from typing import Any

from pgolf.errors import ArtifactError, UserError

LONGEST_CONTEXT = 131_072  # tokens
MOST_PIECES = 65_536


def scoring_of(stored: Any, seq_len: int | None = None, stride: int | None = None) -> dict[str, Any]:
    """Arguments of `evaluate`: those that are stored, with what a command line says instead."""
    scoring = {"stride": 0, "bos_id": None, **(stored if isinstance(stored, dict) else {})}
    given = {"seq_len": seq_len, "stride": stride if stride is not None or seq_len is None else 0}
    given = {name: value for name, value in given.items() if value is not None}
    scoring |= given
    length, stride, bos_id = (scoring.get(name) for name in ("seq_len", "stride", "bos_id"))
    if type(length) is not int or not 1 <= length <= LONGEST_CONTEXT:
        raise _refusal("seq_len", length, f"1 to {LONGEST_CONTEXT}", given)
    if type(stride) is not int or not 0 <= stride <= length:
        raise _refusal("stride", stride, f"0 (no overlap) to --seq-len {length}", given)
    if scoring.keys() != {"seq_len", "stride", "bos_id"} or not (
        bos_id is None or (type(bos_id) is int and 0 <= bos_id < MOST_PIECES)
    ):
        raise ArtifactError("artifact: its metadata does not say how to score it")
    return scoring


def _refusal(name: str, value: Any, accepted: str, given: dict[str, Any]) -> UserError | ArtifactError:
    option = f"--{name.replace('_', '-')} {shortened(value)}: must be a whole number from {accepted}"
    return UserError(option) if name in given else ArtifactError(f"artifact: its metadata asks for {option}")
