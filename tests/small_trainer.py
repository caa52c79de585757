"""A Trainer small enough for a test, on made-up tokens."""

import contextlib
from pathlib import Path

import numpy as np
import torch

from pgolf.data.documents import DocumentLoader
from pgolf.data.loader import TokenLoader
from pgolf.data.prefetch import Prefetcher
from pgolf.data.shards import write_shard
from pgolf.model import Model, ModelConfig
from pgolf.runtime.ranks import Ranks
from pgolf.settings import load_settings
from pgolf.training.trainer import Trainer

CPU = torch.device("cpu")
TINY = {
    "PRESET": "demo",
    "VOCAB_SIZE": "64",
    "MODEL_DIM": "32",
    "NUM_LAYERS": "2",
    "TRAIN_SEQ_LEN": "16",
    "TRAIN_BATCH_TOKENS": "128",
    "MICRO_BATCH_TOKENS": "128",
    "WARMUP_STEPS": "1",
    "MAX_WALLCLOCK_SECONDS": "10000",
    "DTYPE": "float32",
    "TRAIN_LOG_EVERY": "0",
}


class SilentRun:
    """What a Trainer needs of a run."""

    signal = None

    def __init__(self, folder):
        self.folder = folder
        self.lines, self.scored = [], []

    def log(self, line, console=True):
        self.lines.append(line)

    def warn(self, line):
        self.lines.append(f"warning: {line}")

    def metric(self, kind, **values):
        pass

    def log_score(self, step, iterations, score, train_seconds):
        self.scored.append(step)

    def note(self, **values):
        self.noted = {**getattr(self, "noted", {}), **values}

    def deferring_signals(self):
        return contextlib.nullcontext()


def make_trainer(folder: Path, device: torch.device = CPU, **environ: str) -> Trainer:
    """On tokens with period 7; those of LOADER=documents have period 10."""
    settings = load_settings({**TINY, **environ})
    shard = folder / f"{settings.loader}_train_000000.bin"
    documents = settings.loader == "documents"
    write_shard(shard, np.arange(2000) % 10 + 1 if documents else np.arange(2000) * 5 % 7)
    if documents:
        loader = DocumentLoader([shard], settings.bos_id, settings.train_batch_tokens, 1, vocab_size=64)
    else:
        loader = TokenLoader([shard], settings.train_seq_len, settings.train_batch_tokens, 1, vocab_size=64)
    model = Model(ModelConfig.of(settings)).initialise(torch.Generator().manual_seed(1)).to(device)
    return Trainer(model, Prefetcher(loader, device), settings, Ranks(0, 1, device), SilentRun(folder))


def no_score():
    raise AssertionError("VAL_LOSS_EVERY is 0: nobody asked for a score")


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
