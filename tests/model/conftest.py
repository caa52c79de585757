"""Models of a few thousand parameters with every one of them random, so that no path is dead."""

import pytest
import torch

from pgolf.model import Execution, Model, ModelConfig
from pgolf.settings import Settings


@pytest.fixture(scope="session")
def small_config():
    def make(**changes) -> ModelConfig:
        values = {
            "vocab_size": 64,
            "num_layers": 5,
            "model_dim": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "mlp_slope": 0.5,
        }
        return ModelConfig.of(Settings(**{**values, "gate_window": 12, "tied_embed_init_std": 0.5, **changes}))

    return make


@pytest.fixture(scope="session")
def random_model(small_config):
    def make(dtype=torch.float64, seed=0, **changes) -> Model:
        generator = torch.Generator().manual_seed(seed)
        model = Model(small_config(**changes), Execution(dtype)).initialise(generator)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        return model.double() if dtype == torch.float64 else model

    return make
