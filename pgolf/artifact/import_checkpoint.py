"""Weights of the entries' scripts in our model: `pgolf import-checkpoint final_model.pt --preset pr1855`.

Their scripts save a state dict. Each of its tensors is all or a row of one of our parameters; i is one of L layers:

    theirs                                            ours
    tok_emb.weight                                    embedding
    blocks.i.attn.c_q.weight, .proj.weight            qo_bank[i], qo_bank[L + i]
    blocks.i.attn.c_k.weight, .c_v.weight             kv_bank[i], kv_bank[L + i]
    blocks.i.mlp.fc.weight, .proj.weight              up_bank[i], down_bank[i]
    qo_bank, kv_bank, mlp_up_bank, mlp_down_bank      the banks whole, in scripts since #1523
    blocks.i.attn.q_gain                              q_gain[i]
    blocks.i.attn_scale, .mlp_scale, .resid_mix       attn_scale[i], mlp_scale[i], resid_mix[i]
    blocks.i.attn.attn_gate_w, .attn_gate_proj.weight attn_gate[i]
    skip_weights, skip_gates                          the same
    parallel_resid_lambdas, parallel_post_lambdas     the same
    smear_gate.weight, smear_lambda                   smear_gate, smear_lambda
    softcap_pos, softcap_neg                          softcaps[0], softcaps[1]
    bigram.embed.weight, .proj.weight, .scale         bigram_embedding, bigram_projection, bigram_scale
    ve_shared.embed.weight, .proj.weight, .scale      value_embedding, value_projection, value_scale
    ve_layer_scales.j                                 value_layer_scales[j]

The file can hold tensors and plain containers, and no code of it is run (pgolf/runtime/torch_file.py).
"""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf.artifact.file import StoredTensor, write_artifact
from pgolf.errors import DataError
from pgolf.model import ModelConfig, role_of
from pgolf.runtime.torch_file import load_plain

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OWN_FIELDS = {"model", "optimisers", "loader", "step"}  # of pgolf/training/checkpoint.py, whatever its version
WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DistributedDataParallel and torch.compile add


class Place(NamedTuple):
    """Where a tensor of theirs goes: a parameter of ours, or one row of it."""

    name: str
    row: int | None = None


WHOLE = {
    "tok_emb.weight": "embedding",
    "mlp_up_bank": "up_bank",
    "mlp_down_bank": "down_bank",
    "smear_gate.weight": "smear_gate",
    "bigram.embed.weight": "bigram_embedding",
    "bigram.proj.weight": "bigram_projection",
    "bigram.scale": "bigram_scale",
    "ve_shared.embed.weight": "value_embedding",
    "ve_shared.proj.weight": "value_projection",
    "ve_shared.scale": "value_scale",
}
SAME = "qo_bank kv_bank skip_weights skip_gates parallel_resid_lambdas parallel_post_lambdas smear_lambda".split()  # noqa: SIM905
OF_LAYERS = {
    "attn.q_gain": "q_gain",
    "attn_scale": "attn_scale",
    "mlp_scale": "mlp_scale",
    "resid_mix": "resid_mix",
    "attn.attn_gate_w": "attn_gate",
    "attn.attn_gate_proj.weight": "attn_gate",
    "attn.c_q.weight": "qo_bank",
    "attn.c_k.weight": "kv_bank",
    "mlp.fc.weight": "up_bank",
    "mlp.proj.weight": "down_bank",
}
SECOND_HALVES = {"attn.proj.weight": "qo_bank", "attn.c_v.weight": "kv_bank"}


def weight_map(config: ModelConfig) -> dict[str, Place]:
    """Every name that a checkpoint of such a model may use, and its place."""
    layers = config.num_layers
    found = {theirs: Place(ours) for theirs, ours in {**WHOLE, **{name: name for name in SAME}}.items()}
    for layer in range(layers):
        found |= {f"blocks.{layer}.{theirs}": Place(ours, layer) for theirs, ours in OF_LAYERS.items()}
        found |= {f"blocks.{layer}.{theirs}": Place(ours, layers + layer) for theirs, ours in SECOND_HALVES.items()}
    found |= {"softcap_pos": Place("softcaps", 0), "softcap_neg": Place("softcaps", 1)}
    for index in range(len(config.value_embedding_layers)):
        found[f"ve_layer_scales.{index}"] = Place("value_layer_scales", index)
    shapes = config.shapes()
    return {theirs: place for theirs, place in found.items() if place.name in shapes}


def convert(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our parameters, float32, from a state dict of theirs.

    `DataError` names the tensor that this model has no place for, that is missing, not finite or of the wrong shape.
    """
    places, shapes = weight_map(config), config.shapes()
    result = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for theirs, tensor in state.items():
        if theirs not in places:
            raise DataError(f"{theirs}: this model has no place for it; was it another preset's?")
        name, row = places[theirs]
        target = result[name] if row is None else result[name][row]
        _check_kind(theirs, tensor)
        if tensor.squeeze().shape != target.squeeze().shape:
            raise DataError(f"{theirs}: shape {tuple(tensor.shape)}, but {name} needs {tuple(target.shape)}")
        target.copy_(tensor.detach().reshape(target.shape))
        if not target.isfinite().all():
            raise DataError(f"{theirs}: holds numbers that are not finite in float32")
    by_rows = not any(name.endswith("_bank") for name in state)
    for theirs, (name, row) in sorted(places.items(), key=lambda item: (item[1].row is None) == by_rows):
        if (result[name] if row is None else result[name][row]).isnan().any():
            raise DataError(f"{theirs}: missing; {name} of this model needs it")
    return result


def _check_kind(name: str, tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_nested or tensor.layout is not torch.strided:
        raise DataError(f"{name}: a sparse, nested or otherwise special tensor; weights are dense")
    if tensor.device.type != "cpu":
        raise DataError(f"{name}: a {tensor.device.type} tensor, which has no numbers in it")
    if tensor.dtype not in DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise DataError(f"{name}: {str(tensor.dtype).removeprefix('torch.')}, but weights are floating point: {kinds}")


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A state dict from a file of torch.save, without running anything in it. `DataError` where it is none."""
    try:
        state = load_plain(path)
    except ValueError as error:
        raise DataError(f"cannot be read as weights ({error})") from None
    if isinstance(state, dict) and state.keys() >= OWN_FIELDS:
        raise DataError(
            "a checkpoint of this package's own run, not an entry's weights; `pgolf eval RUN` scores its artifact, "
            "RESUME=RUN goes on with it"
        )
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) and isinstance(n, str) for n, x in state.items()):
        raise DataError("not a state dict, which has nothing but tensors by name")
    for prefix in WRAPPERS:
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def import_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: ModelConfig,
    metadata: dict[str, Any],
) -> int:
    """Write the weights of `source` to `target`, an artifact in float32, not compressed; returns its bytes."""
    try:
        weights = convert(read_state(source), config)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    stored = [StoredTensor(name, role_of(name), tuple(x.shape), x, None, 32) for name, x in weights.items()]
    return write_artifact(target, stored, {"model": config.as_dict(), **metadata}, mode="static").total
