"""Mutated artifacts: most with their checksums put right, read and built into a model."""

import os
import random
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path

from bench.studies.attacks.outcomes import MEMORY_BYTES, ROOT, watch

SIGNED_SHARE = 0.75  # of the artifacts, whose checksums are put right


def artifacts(seconds: float, seed: int) -> Counter[str]:
    """Read and built by a process of bounded memory, which is started anew where it dies."""
    with tempfile.TemporaryDirectory() as folder:
        write_good_artifact(Path(folder) / "good.pgolf")
        start = [sys.executable, "-m", "bench.studies.attacks.artifacts", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(ROOT)}
        return watch("artifacts", lambda at: [*start, str(at)], seconds, seed, environment)


def write_good_artifact(path: Path) -> None:
    """A small model with everything in it that a file can hold."""
    import torch

    from pgolf.artifact import write_artifact
    from pgolf.model import Model, ModelConfig
    from pgolf.quantization.config import QuantizationConfig
    from pgolf.quantization.quantize import quantize
    from pgolf.settings import load_settings

    environ = {"PRESET": "demo", "VOCAB_SIZE": "60", "MODEL_DIM": "32", "NUM_LAYERS": "2", "LQER_RANK": "2"}
    settings = load_settings({**environ, "BIGRAM_VOCAB_SIZE": "50", "BIGRAM_DIM": "8", "VE_LAYERS": "1", "VE_DIM": "8"})
    model = Model(ModelConfig.of(settings)).initialise(torch.Generator().manual_seed(0))
    moments = {
        name: torch.eye(bank.shape[-1]).repeat(len(bank) if bank.ndim == 3 else 1, 1, 1)
        for name, bank in model.named_parameters()
    }
    scoring = {"scoring": settings.scoring, "looping": False, "tokenizer_sha256": "0" * 64}
    write_artifact(
        path, quantize(model, moments, QuantizationConfig.of(settings)), {"model": model.config.as_dict(), **scoring}
    )


def read_mutants(folder: Path, seed: int) -> None:
    """The process that `artifacts` watches."""
    good, trial = folder / "good.pgolf", folder / "trial.pgolf"
    assert read_and_build(good) == ("valid", "")  # what is imported and started for it is not counted below
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    while True:
        print(seed, flush=True)
        trial.write_bytes(mutant(good.read_bytes(), seed))
        outcome, what = read_and_build(trial)
        print(seed, outcome.replace(" ", "_"), what, flush=True)
        seed += 1


def mutant(whole: bytes, seed: int) -> bytes:
    from test_artifact_fuzz import corrupt, mutate_and_sign

    chance = random.Random(seed)
    return (mutate_and_sign if chance.random() < SIGNED_SHARE else corrupt)(whole, chance)


def read_and_build(path: Path) -> tuple[str, str]:
    """The outcome, and a word on it."""
    import torch

    from pgolf.artifact import read_artifact
    from pgolf.artifact.model import model_from_artifact
    from pgolf.errors import PgolfError
    from pgolf.model import Execution

    torch.set_num_threads(1)
    try:
        artifact = read_artifact(path)
        if "model" in artifact.metadata:
            model_from_artifact(artifact, Execution(), torch.device("cpu"))
    except PgolfError as error:
        return ("crash", "several lines") if "\n" in str(error) else ("refused", "")
    except MemoryError:
        return "too much memory", ""
    except Exception as error:
        what = repr(error).replace("\n", " ")
        return "too much memory" if "not enough memory" in what else "crash", what  # as torch says it
    return "valid", ""


if __name__ == "__main__":
    read_mutants(Path(sys.argv[1]), int(sys.argv[2]))
