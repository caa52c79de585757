"""What all tests share: made-up data for runs of a second, and bench/ in the path (`import aot`)."""

import getpass
import os
import random
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported; pgolf/run/entry.py tells why
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # `pytest -n`: the workers share the cores
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

# Inductor's cache does not know ATEN_CPU_CAPABILITY: what was made for vectors of 512 bits is taken where they have
# 256, and writes behind its buffers.
setting = os.environ.get("ATEN_CPU_CAPABILITY", "native")
cache = Path(tempfile.gettempdir()) / f"pgolf-tests-inductor-{getpass.getuser()}-{setting}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))

sys.path.append(str(Path(__file__).parent.parent))

WORDS = "the of and to in is that for it as was with be by on not he his but at are this have from".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def made_up_text():
    """made_up_text(documents, seed=0) -> documents of common words in random order: something to learn."""

    def make(documents: int, seed: int = 0) -> list[str]:
        choice = random.Random(seed)
        return [
            "\n".join(" ".join(choice.choices(WORDS, k=12)) + "." for _ in range(choice.randint(5, 20)))
            for _ in range(documents)
        ]

    return make


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory, made_up_text):
    """(folder of shards, tokenizer of 320 pieces) for runs of a second."""
    from pgolf.data.prepare import tokenize_files

    folder = tmp_path_factory.mktemp("text")
    files = []
    for index, text in enumerate(made_up_text(60)):
        files.append(folder / f"{index}.txt")
        files[-1].write_text(text, encoding="utf-8")
    paths = tokenize_files(files, folder / "tiny", vocab_size=320)
    return paths.data_path, paths.tokenizer_path


@pytest.fixture(scope="session")
def tiny_environ(tiny_data):
    """Environment variables of a run of a few steps on `tiny_data`."""
    data_path, tokenizer_path = tiny_data
    return {
        "PRESET": "demo",
        "DATA_PATH": str(data_path),
        "TOKENIZER_PATH": str(tokenizer_path),
        "VOCAB_SIZE": "320",
        "MODEL_DIM": "32",
        "NUM_LAYERS": "3",
        "TRAIN_SEQ_LEN": "32",
        "TRAIN_BATCH_TOKENS": "256",
        "MICRO_BATCH_TOKENS": "256",
        "VAL_BATCH_SIZE": "256",
        "WARMUP_STEPS": "1",
        "ITERATIONS": "6",
        "MAX_WALLCLOCK_SECONDS": "10000",
        "GPTQ_CALIBRATION_BATCHES": "4",
        "DTYPE": "float32",
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
