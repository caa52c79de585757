"""Fresh weights."""

import torch
from torch import Tensor, nn

from pgolf.model.config import ModelConfig

# Parameters that begin at one value everywhere; those that are not named here begin at 1.
CONSTANTS = {
    "skip_gates": 0.0,
    "attn_gate": 0.0,
    "parallel_resid_lambdas": 1.1,  # PR #1529
    "smear_gate": 0.0,
    "smear_lambda": 0.0,
    "bigram_projection": 0.0,
    "bigram_scale": 0.05,
    "value_projection": 0.0,
    "value_scale": 0.1,
}


@torch.no_grad()
def initialise(parameters: dict[str, Tensor], config: ModelConfig, generator: torch.Generator) -> None:
    """Orthogonal input matrices, zero output projections, the embedding small because it is tied."""
    layers = config.num_layers
    parameters["embedding"].normal_(0.0, config.tied_embed_init_std, generator=generator)
    for bank in (parameters["qo_bank"][:layers], parameters["kv_bank"], parameters["up_bank"]):
        for matrix in bank:
            nn.init.orthogonal_(matrix, generator=generator)
    parameters["qo_bank"][layers:].zero_()
    parameters["down_bank"].zero_()
    parameters["q_gain"].fill_(config.qk_gain_init)
    parameters["resid_mix"][:, 1].zero_()
    for name, value in CONSTANTS.items():
        if name in parameters:
            parameters[name].fill_(value)
    for name in ("bigram_embedding", "value_embedding"):
        if name in parameters:
            parameters[name].normal_(0.0, 0.01, generator=generator)
    if "softcaps" in parameters:
        parameters["softcaps"].fill_(config.logit_softcap)
