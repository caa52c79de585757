"""From an artifact back to a model that computes."""

import math
from collections.abc import Iterable
from dataclasses import fields

import torch

from pgolf.artifact.corrections import add_corrections, corrected_by
from pgolf.artifact.file import Artifact
from pgolf.artifact.stored_tensor import StoredTensor
from pgolf.errors import ArtifactError, UserError
from pgolf.model import Execution, Model, ModelConfig
from pgolf.settings import validate


def model_from_artifact(artifact: Artifact, execution: Execution, device: torch.device) -> Model:
    """Build the model that an artifact describes, with the artifact's weights and nothing else."""
    described = artifact.metadata.get("model")
    if not isinstance(described, dict) or described.keys() != {field.name for field in fields(ModelConfig)}:
        raise ArtifactError("artifact: its metadata does not describe a model of this version")
    try:
        config = ModelConfig.of(validate(described))  # the same rules as for a user's settings
    except UserError as error:
        raise ArtifactError(f"artifact: its model cannot be: {error}") from None
    _of_model(config, artifact.tensors.values())  # before anything is allocated for it
    model = Model(config, execution)
    model.enter(looping=config.num_loops > 0 and artifact.metadata.get("looping", True) is True)
    load_weights(model, artifact.tensors.values())
    return model.to(device)


def load_weights(model: Model, tensors: Iterable[StoredTensor]) -> None:
    """Put stored tensors, corrections added, into `model`; names and shapes must be the model's, weights finite."""
    plain, factors = _of_model(model.config, tensors)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = {name: plain[name].dequantize(torch.float32)}
            try:
                add_corrections(weight, factors.get(name, {}))
            except ValueError as error:
                raise ArtifactError(f"artifact: {error}") from None
            if not all(math.isfinite(end) for end in torch.aminmax(weight[name])):  # NaN wins in both
                raise ArtifactError(f"artifact: the weights of {name} are not finite")
            parameter.copy_(weight[name])
    model.weights_changed()


def _of_model(
    config: ModelConfig, tensors: Iterable[StoredTensor]
) -> tuple[dict[str, StoredTensor], dict[str, dict[str, StoredTensor]]]:
    """A model's tensors, and those that correct each; an ArtifactError where they are not what it needs.

    Looks at names and shapes only, so that a model that is not there costs nothing, however large it is said to be.
    """
    plain: dict[str, StoredTensor] = {}
    factors: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors:
        corrects = corrected_by(tensor.name)
        (plain if corrects is None else factors.setdefault(corrects, {}))[tensor.name] = tensor
    expected, found = config.shapes(), {name: tensor.shape for name, tensor in plain.items()}
    if found != expected:
        wrong = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ArtifactError(f"artifact: {wrong} is {found.get(wrong)}, the model needs {expected.get(wrong)}")
    for name, its_factors in factors.items():
        if name not in plain:
            raise ArtifactError(f"artifact: {min(its_factors)}: corrects no matrix of this model")
    return plain, factors
