"""From trained weights to what the artifact stores, and back.

Matrices and embedding: GPTQ against the Hessian of their inputs, int6 and int8 with one float16 scale a row. Small
parameters: float16. Hessians come from training batches seen by the trained model, inside the training budget.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields

import torch
from torch import Tensor

from pgolf import ops
from pgolf.artifact import Artifact, StoredTensor
from pgolf.distributed import Ranks
from pgolf.errors import ArtifactError, UserError
from pgolf.model import Model, ModelConfig, role_of
from pgolf.settings import Settings, validate


@torch.inference_mode()
def collect_hessians(
    model: Model, batches: Iterable[Tensor], ranks: Ranks, seconds_left: Callable[[], float]
) -> dict[str, Tensor]:
    """Sum of x^T x over the inputs x of every matrix: name -> (count, columns, columns) float32, on the CPU.

    `batches` are token rows (rows, length). Stops when a batch like the longest so far would not fit in
    `seconds_left()`; the first is always taken.
    """
    device = next(model.parameters()).device
    hessians = {
        name: torch.zeros(len(bank) if bank.ndim == 3 else 1, bank.size(-1), bank.size(-1), device=device)
        for name, bank in model.named_parameters()
        if role_of(name) != "control"
    }
    seen, first = torch.empty(0), ("", 0)  # the last input, and which matrix had it first: q, k and v share theirs
    owners = {}  # (name, index) -> the matrix whose sum is also this one's

    def observe(name: str, index: int, x: Tensor) -> None:
        nonlocal seen, first
        if x is not seen:
            seen, first = x, (name, index)
            ops.accumulate_hessian(hessians[name][index], x)
        owners[name, index] = first

    longest, before = 0.0, seconds_left()
    for tokens in batches:
        model(tokens.to(device), observe)
        left = seconds_left()
        longest, before = max(longest, before - left), left
        if ranks.any(left < longest):
            break
    for (name, index), (owner, its_index) in owners.items():
        if (name, index) != (owner, its_index):
            hessians[name][index] = hessians[owner][its_index]
    ranks.sum_(*hessians.values())
    return {name: hessian.cpu() for name, hessian in hessians.items()}


def quantize(model: Model, hessians: dict[str, Tensor], settings: Settings) -> list[StoredTensor]:
    """Every parameter in its stored form."""
    stored = []
    for name, parameter in model.named_parameters():
        weight, role = parameter.detach().float().cpu(), role_of(name)
        if role == "control":
            stored.append(StoredTensor(name, role, tuple(weight.shape), weight.half(), None, 16))
            continue
        embedding = role == "embedding"
        bits = settings.embed_bits if embedding else settings.matrix_bits
        values, scale = ops.gptq(
            weight,
            hessians[name][0] if embedding else hessians[name],
            bits,
            clip_sigmas=settings.embed_clip_sigmas if embedding else settings.matrix_clip_sigmas,
            damping=settings.gptq_damping,
        )
        stored.append(StoredTensor(name, role, tuple(weight.shape), values, scale, bits))
    return stored


def model_from_artifact(artifact: Artifact, dtype: torch.dtype, device: torch.device) -> Model:
    """Build the model that an artifact describes, with the artifact's weights and nothing else."""
    described = artifact.metadata.get("model")
    if not isinstance(described, dict) or described.keys() != {field.name for field in fields(ModelConfig)}:
        raise ArtifactError("artifact: its metadata does not describe a model of this version")
    try:
        config = ModelConfig.of(validate(described))  # the same rules as for a user's settings
    except UserError as error:
        raise ArtifactError(f"artifact: its model cannot be: {error}") from None
    expected = config.shapes()
    found = {name: tensor.shape for name, tensor in artifact.tensors.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ArtifactError(f"artifact: {wrong[0]} is {found.get(wrong[0])}, the model needs {expected.get(wrong[0])}")
    model = Model(config, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(artifact.tensors[name].dequantize(torch.float32))
    return model.to(device)
