"""A Trainer for benchmarks: the preset's own settings, an eighth of its batch on a GPU, random documents as data."""

from pathlib import Path

import numpy as np
import torch

from pgolf.data.dataset import training_loader
from pgolf.data.shards import write_shard
from pgolf.model import Model, ModelConfig, choose_execution
from pgolf.runtime.machine import compute_dtype
from pgolf.runtime.ranks import Ranks
from pgolf.settings import Settings, load_settings
from pgolf.training.trainer import Trainer

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
RANKS = Ranks(0, 1, DEVICE)
DOCUMENT_TOKENS = 950  # on average, as FineWeb's have in 8,192 pieces
GPUS = 8


def settings_of(preset: str, **environ: str) -> Settings:
    """Of a run in which this device is one of eight, or the only one for `demo`."""
    if preset != "demo":
        tokens = load_settings({"RUN_ID": "bench"}, preset=preset).train_batch_tokens // GPUS
        environ = {"TRAIN_BATCH_TOKENS": str(tokens), "MICRO_BATCH_TOKENS": str(tokens), **environ}
    return load_settings({"RUN_ID": "bench", **environ}, preset=preset, cuda=CUDA)


def make_model(settings: Settings) -> Model:
    dtype = compute_dtype(settings.dtype, DEVICE)
    execution = choose_execution(
        DEVICE, dtype, settings.longest_text, attention=settings.attention, fused_glue=settings.fused_glue
    )
    return Model(ModelConfig.of(settings), execution).initialise(torch.Generator().manual_seed(1)).to(DEVICE)


def make_loader(settings: Settings, folder: Path):
    """Batches of random tokens, ahead on the device."""
    shard = folder / "random_train_000000.bin"
    if not shard.exists():
        rng = np.random.default_rng(settings.seed)
        tokens = rng.integers(2, settings.vocab_size, 8 * settings.train_batch_tokens)
        tokens[rng.random(len(tokens)) < 1 / DOCUMENT_TOKENS] = settings.bos_id
        tokens[0] = settings.bos_id
        write_shard(shard, tokens)
    return training_loader(settings, [shard], RANKS)


def make_trainer(settings: Settings, folder: Path, *, last_phase: bool = True) -> Trainer:
    """In the last phase of a run, with loops where the model has them, or in the first."""
    trainer = Trainer(make_model(settings), make_loader(settings, folder), settings, RANKS, run=None)
    trainer._set(trainer.schedule.phases()[-1 if last_phase else 0])
    return trainer


def take_step(trainer: Trainer) -> torch.Tensor:
    """As the training loop does it, the average included."""
    loss = trainer.take_step(0.1)
    if trainer.average:
        trainer.average.update(1, 1.0)
    return loss
