"""A run's checkpoints: everything that training needs to go on, and the only place that knows their format.

`checkpoint.pt` is the newest, `checkpoint.previous.pt` the one before it. Each is a dict that torch.save wrote, of
tensors and plain values; no code in it is ever run. A file is checked before and after it is read: what its container
declares must fit into the file, every number must be of its type and in its range, every tensor dense and finite.
"""

import errno
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf.errors import UserError
from pgolf.runtime.files import replacing
from pgolf.runtime.torch_file import load_plain

CHECKPOINT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
FIELDS = {"model", "optimisers", "average", "loader", "step", "flops", "used_seconds"}
MOST_STEPS = 10**9
MOST_FLOPS = 10**30
MOST_SECONDS = 1e9

State = dict[str, Any]


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, hostile, or of another run; the message names the file."""


class NotFinite(CheckpointError):
    """A state that must not be kept: weights or momenta with NaN or infinity in them."""


def save(path: str | os.PathLike[str], state: State, keep_old: bool = True) -> int:
    """Write `state`, a dict of `FIELDS`, and return its bytes. The checkpoint that was there becomes the previous one.

    `NotFinite` and the `WriteError` of a full disk leave what is there as it is.
    """
    path = Path(path)
    if not all(_finite(tensor) for tensor in tensors_in(state)):
        raise NotFinite(f"{path}: not written, for the weights of step {state['step']} are not finite")
    with replacing(path, old_becomes=path.with_name(PREVIOUS) if keep_old else None) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # by which torch hides what the disk said
            said = error.__context__
            raise said if isinstance(said, OSError) else OSError(errno.EIO, os.strerror(errno.EIO)) from None
        return int(file.tell())


def candidates(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return [path for path in (Path(folder, CHECKPOINT), Path(folder, PREVIOUS)) if os.path.isfile(path)]


def load(path: str | os.PathLike[str]) -> State:
    """The state in the file `path`, on the CPU, with everything checked that can be without the model."""
    path = Path(path)
    state = _read(path)
    try:
        _check(state)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a checkpoint of a run ({error})") from None
    return state


def load_first(
    folder: str | os.PathLike[str],
    use: Callable[[State], Any],
    tell: Callable[[str], Any] = lambda line: None,
    agreed: Callable[[bool], bool] = bool,
) -> Path:
    """Call `use` with the state of the newest checkpoint in `folder` that can be read and that `use` accepts.

    `tell` hears of each that is passed over. `agreed` is asked after each whether it was accepted: by all ranks, say.
    `CheckpointError` when none is left.
    """
    reasons: list[str] = []
    for path in (Path(folder, CHECKPOINT), Path(folder, PREVIOUS)):
        if reasons and path.exists():
            tell(f"{reasons[-1]}; going back to {path.name}")
        try:
            use(load(path))
        except CheckpointError as error:
            if path.exists() or not reasons:
                reasons.append(str(error))
        except ValueError as error:  # of the receiver: a state of another model, optimiser or data
            reasons.append(f"{path}: not a checkpoint of these settings ({str(error).partition(chr(10))[0]})")
        else:
            if agreed(True):
                return path
            reasons.append(f"{path}: another process cannot use it")
            continue
        agreed(False)
    raise CheckpointError("; ".join(reasons))


def weights(path: str | os.PathLike[str]) -> list[tuple[str, Tensor]]:
    """The parameters of a run by name, on the CPU: their average where there is one, as at the end of training.

    `path` is a run's folder, of which the newest readable checkpoint is taken, or a checkpoint.
    """
    found: list[State] = []
    if Path(path).is_dir():
        load_first(path, found.append)
    else:
        found.append(load(path))
    (state,) = found
    average = state["average"]
    values = average["average"] if average and average["updates"] else state["model"].values()
    return list(zip(state["model"], values, strict=True))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with each tensor changed, in the order of `tensors_in`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: with_tensors(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_tensors(item, change) for item in value]
    return value


def _read(path: Path) -> Any:
    """The tensors and plain values in the file, no more bytes of them than it has."""
    try:
        state = load_plain(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a checkpoint of a run ({error})") from None
    storages = {}
    for tensor in tensors_in(state):
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: not a checkpoint of a run (a tensor of a kind that no run writes)")
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    if sum(storages.values()) > path.stat().st_size:
        raise CheckpointError(f"{path}: not a checkpoint of a run (its tensors are larger than the file)")
    return state


def _check(state: Any) -> None:
    """`ValueError` says what is wrong with a state."""
    if not isinstance(state, dict) or state.keys() != FIELDS:
        raise ValueError("its fields are others")
    for name, kind, most in (
        ("step", int, MOST_STEPS),
        ("flops", int, MOST_FLOPS),
        ("used_seconds", float, MOST_SECONDS),
    ):
        check_number(name, state[name], kind, most)
    model, average = state["model"], state["average"]
    if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
        raise ValueError("model: expected tensors by name")
    check_tensors("model", dict(model))
    if average is not None:
        if not isinstance(average, dict) or average.keys() != {"average", "updates"}:
            raise ValueError("average: its fields are others")
        check_number("average updates", average["updates"], int, state["step"])
        if not isinstance(average["average"], list):
            raise ValueError("average: expected a list of tensors")
        check_tensors("average", dict(enumerate(average["average"])), dict(enumerate(model.values())))
    loader = state["loader"]
    if not isinstance(loader, dict) or not all(isinstance(value, int | str | list) for value in loader.values()):
        raise ValueError("loader: expected numbers by name")
    optimisers = state["optimisers"]
    if not isinstance(optimisers, list) or not all(isinstance(each, dict) for each in optimisers):
        raise ValueError("optimisers: expected a list of states")


def check_number(name: str, value: Any, kind: type[int] | type[float], most: float) -> None:
    """`value` must be a plain `kind`, finite, and 0 to `most`."""
    if type(value) is not kind:
        raise ValueError(f"{name} is {type(value).__name__}, expected {kind.__name__}")
    if not (math.isfinite(value) and 0 <= value <= most):
        raise ValueError(f"{name} is {value}, expected 0 to {most:g}")


def check_tensors(name: str, found: Any, expected: dict[Any, Tensor] | None = None) -> None:
    """`found` must hold dense finite tensors, of the keys, shapes and dtypes of `expected` where that is given."""
    if not isinstance(found, dict) or (expected is not None and found.keys() != expected.keys()):
        raise ValueError(f"{name}: its tensors have other names than this model's")
    for key, tensor in found.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.is_contiguous():
            raise ValueError(f"{name} {key}: expected a tensor of numbers")
        if expected is not None and (tensor.shape, tensor.dtype) != (expected[key].shape, expected[key].dtype):
            ours, theirs = expected[key], tensor
            raise ValueError(
                f"{name} {key} is {theirs.dtype} {tuple(theirs.shape)}, expected {ours.dtype} {tuple(ours.shape)}"
            )
        if not _finite(tensor):
            raise ValueError(f"{name} {key} has values that are not finite")


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
