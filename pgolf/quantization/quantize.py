"""From trained weights to what the artifact stores, and back.

Matrices and embedding: QUANTIZER against the Hessian of their inputs, int6 and int8 with one float16 scale a row. Small
parameters: float16. LQER_RANK adds low-rank corrections. Hessians come from training batches seen by the trained model,
inside the training budget.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from pgolf import ops
from pgolf.artifact import Artifact, ByteCount, StoredTensor
from pgolf.data.batch import MicroBatch
from pgolf.errors import ArtifactError, QuantizeError, UserError
from pgolf.model import LOOKED_UP, Model, ModelConfig, role_of
from pgolf.quantization import byte_budget as rate_budget
from pgolf.quantization import low_rank
from pgolf.quantization.byte_budget import Coded, Fit
from pgolf.runtime.ranks import Ranks
from pgolf.settings import Settings, validate


@torch.inference_mode()
def collect_hessians(
    model: Model, batches: Iterable[MicroBatch], ranks: Ranks, seconds_left: Callable[[], float]
) -> dict[str, Tensor]:
    """Sum of x^T x over the inputs x of every matrix: name -> (count, columns, columns) float32, on the CPU.

    Stops when a batch like the longest so far would not fit in `seconds_left()`; the first is always taken.
    """
    device = next(model.parameters()).device
    hessians = {
        name: torch.zeros(len(bank) if bank.ndim == 3 else 1, bank.size(-1), bank.size(-1), device=device)
        for name, bank in model.named_parameters()
        if role_of(name) != "control"
    }
    for name in LOOKED_UP:
        if name in hessians:  # all columns weigh the same
            hessians[name].copy_(torch.eye(hessians[name].size(-1)))
    seen, first = torch.empty(0), ("", 0)  # the last input, and which matrix had it first: q, k and v share theirs
    owners: dict[tuple[str, int], tuple[str, int]] = {}  # (name, index) -> the matrix whose sum is also this one's

    def observe(name: str, index: int, x: Tensor) -> None:
        nonlocal seen, first
        if x is not seen:
            seen, first = x, (name, index)
            ops.accumulate_hessian(hessians[name][index], x)
        owners[name, index] = first

    longest, before = 0.0, seconds_left()
    for batch in batches:
        inputs, _, borders, longest_document = batch.to(device)
        model(inputs, borders, longest_document, observe=observe)
        left = seconds_left()
        longest, before = max(longest, before - left), left
        if ranks.any(left < longest):
            break
    for (name, index), (owner, its_index) in owners.items():
        if (name, index) != (owner, its_index):
            hessians[name][index] = hessians[owner][its_index]
    ranks.sum_(*hessians.values())
    for name, hessian in hessians.items():
        if not hessian.isfinite().all():
            raise QuantizeError(f"{name}: the second moments of its inputs are not finite")
    return {name: hessian.cpu() for name, hessian in hessians.items()}


def quantize(
    model: Model,
    hessians: dict[str, Tensor],
    settings: Settings,
    clips: dict[str, float] | None = None,
    alive: Callable[[], Any] = lambda: None,
) -> list[StoredTensor]:
    """Every parameter in its stored form, then the corrections. `clips` are the clip_sigmas of single tensors; `alive`
    is called after each of those that take time."""
    stored, weights = [], {name: parameter.detach().float().cpu() for name, parameter in model.named_parameters()}
    for name, weight in weights.items():
        role = role_of(name)
        shape = tuple(weight.shape)
        if role == "control" or rate_budget.bits_of(name, settings) == 16:
            if not weight.half().isfinite().all():
                raise QuantizeError(f"{name}: holds numbers that are not finite in float16")
            stored.append(StoredTensor(name, role, shape, weight.half(), None, 16))
            continue
        bits = rate_budget.bits_of(name, settings)
        clip_sigmas = (clips or {}).get(name, rate_budget.clip_of(name, settings))
        try:
            found = rate_budget.quantize_tensor(name, weight, hessians, settings, clip_sigmas)
        except ValueError as error:
            raise QuantizeError(f"{name}: {error}") from None
        stored.append(StoredTensor(name, role, shape, found.values, found.scale, bits, found.order, found.states))
        alive()
    if settings.lqer_rank:
        stored += low_rank.corrections(weights, stored, hessians, settings)
    return stored


def load_weights(model: Model, tensors: Iterable[StoredTensor]) -> None:
    """Put stored tensors, corrections added, into `model`; names and shapes must be the model's, weights finite."""
    plain, factors = _of_model(model.config, tensors)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = {name: plain[name].dequantize(torch.float32)}
            try:
                low_rank.add_corrections(weight, factors.get(name, {}))
            except ValueError as error:
                raise ArtifactError(f"artifact: {error}") from None
            if not all(math.isfinite(end) for end in torch.aminmax(weight[name])):  # NaN wins in both
                raise ArtifactError(f"artifact: the weights of {name} are not finite")
            parameter.copy_(weight[name])


def _of_model(
    config: ModelConfig, tensors: Iterable[StoredTensor]
) -> tuple[dict[str, StoredTensor], dict[str, dict[str, StoredTensor]]]:
    """A model's tensors, and those that correct each; an ArtifactError where they are not what it needs.

    Looks at names and shapes only, so that a model that is not there costs nothing, however large it is said to be.
    """
    plain: dict[str, StoredTensor] = {}
    factors: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors:
        corrects = low_rank.corrected_by(tensor.name)
        (plain if corrects is None else factors.setdefault(corrects, {}))[tensor.name] = tensor
    expected, found = config.shapes(), {name: tensor.shape for name, tensor in plain.items()}
    if found != expected:
        wrong = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ArtifactError(f"artifact: {wrong} is {found.get(wrong)}, the model needs {expected.get(wrong)}")
    for name, its_factors in factors.items():
        if name not in plain:
            raise ArtifactError(f"artifact: {min(its_factors)}: corrects no matrix of this model")
    return plain, factors


def quantize_to_size(
    model: Model,
    hessians: dict[str, Tensor],
    settings: Settings,
    rises: dict[str, float],
    write: Callable[[list[StoredTensor]], ByteCount],
    target: int,
    first: ByteCount | None = None,
    alive: Callable[[], Any] = lambda: None,
) -> tuple[Fit, str]:
    """Quantise and `write` until the file has `target` bytes, or up to 0.1% fewer; and what that cost, in words.

    `rises` are those of `rate_budget.measure_rises`; without any, all steps change by one factor. `first` are the bytes
    of the file at the settings' steps, if it has been written. Where the least possible file is not small enough the
    smallest is kept.
    """
    names = rate_budget.quantized_names(model, settings)
    counts = {name: p.numel() for name, p in model.named_parameters() if name in names}
    last: dict[str, float] = {}

    def coded(count: ByteCount) -> Coded:
        return Coded(count.total, {name: count.streams[f"{name}:values"] for name in counts})

    def code(clips: dict[str, float]) -> Coded:
        count = write(quantize(model, hessians, settings, clips, alive))
        last.clear()
        last.update(clips)
        return coded(count)

    clips = {name: rate_budget.clip_of(name, settings) for name in counts}
    equal = {name: float(count) for name, count in counts.items()}
    found = rate_budget.fit(code, clips, counts, rises or equal, target, coded(first) if first else None)
    if last != found.clips:
        write(quantize(model, hessians, settings, found.clips, alive))
    return found, rate_budget.cost(found, clips, counts, rises)


def quantize_within_budget(
    model: Model,
    hessians: dict[str, Tensor],
    settings: Settings,
    rises: dict[str, float],
    write: Callable[[list[StoredTensor]], ByteCount],
    code_bytes: int,
    alive: Callable[[], Any] = lambda: None,
) -> str | None:
    """Quantise and `write` at the settings' steps, at ARTIFACT_BYTES, or, when over budget, at steps that fit.

    A line says what that took; None where the settings' steps were good enough.
    """
    room, wanted, first, because = settings.budget_bytes - code_bytes, settings.artifact_bytes, None, ""
    target = min(wanted or room, room)
    if not wanted or room <= 0:
        first = write(quantize(model, hessians, settings, alive=alive))
        if first.total <= room:
            return None
        because = f"{first.total - room} bytes over budget at the settings' steps; "
        if room <= 0:
            return f"artifact: {because}the code alone takes {code_bytes} of {settings.budget_bytes}"
    elif wanted > room:
        because = f"ARTIFACT_BYTES={wanted} leaves too little for {code_bytes} bytes of code; "
    found, cost = quantize_to_size(model, hessians, settings, rises, write, target, first, alive)
    short = "" if found.fits else ", THE LEAST THAT CAN BE HAD"
    return f"artifact:{found.total} of {target} bytes{short}: {because}{cost}"


def model_from_artifact(artifact: Artifact, dtype: torch.dtype, device: torch.device, attention: str = "auto") -> Model:
    """Build the model that an artifact describes, with the artifact's weights and nothing else."""
    described = artifact.metadata.get("model")
    if not isinstance(described, dict) or described.keys() != {field.name for field in fields(ModelConfig)}:
        raise ArtifactError("artifact: its metadata does not describe a model of this version")
    try:
        config = ModelConfig.of(validate(described))  # the same rules as for a user's settings
    except UserError as error:
        raise ArtifactError(f"artifact: its model cannot be: {error}") from None
    _of_model(config, artifact.tensors.values())  # before anything is allocated for it
    model = Model(config, dtype)
    model.attention = attention
    model.looping = config.num_loops > 0 and artifact.metadata.get("looping", True) is True
    load_weights(model, artifact.tensors.values())
    if config.asym_logit_rescale:
        model.caps_differ = bool((model.softcaps != config.logit_softcap).any())
    return model.to(device)
