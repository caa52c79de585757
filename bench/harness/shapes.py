"""The shapes that are measured: the record's on CUDA, on CPU the demo's or a few matrices of the record's banks."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shapes:
    values: int  # to pack
    dequantize: tuple[int, int, int]  # banks, rows, columns
    mlp: tuple[int, int, int]  # tokens, D, H
    logits: tuple[int, int]  # tokens, vocabulary
    banks: dict[str, tuple[int, int, int]]  # of Newton-Schulz: count, rows, columns
    gptq: dict[str, tuple[int, ...]]  # (rows, columns) or (count, rows, columns)
    dtypes: tuple[torch.dtype, ...]  # to compute in


RECORD_GPTQ = {  # all matrices of a record, a bank each
    "record q and o": (22, 512, 512),
    "record k and v": (22, 256, 512),
    "record up": (11, 2048, 512),
    "record down": (11, 512, 2048),
    "record embedding": (8192, 512),
}

RECORD = Shapes(
    values=8 << 20,
    dequantize=(22, 512, 512),
    mlp=(98_304, 512, 2048),
    logits=(98_304, 8192),
    banks={"q and o": (22, 512, 512), "k and v": (22, 256, 512), "up": (11, 2048, 512)},
    gptq={"matrix 512x512": (512, 512), "matrix 2048x512": (2048, 512), "bank": (22, 512, 512)},
    dtypes=(torch.bfloat16,),
)
SMALL = Shapes(
    values=8 << 20,
    dequantize=(22, 512, 512),
    mlp=(4096, 256, 768),
    logits=(4096, 1024),
    banks={"q and o": (4, 512, 512), "k and v": (4, 256, 512), "up": (2, 2048, 512)},
    gptq={"matrix 512x512": (512, 512), "matrix 2048x512": (2048, 512), "bank": (4, 512, 512)},
    dtypes=(torch.float32, torch.bfloat16),
)
SHAPES = RECORD if torch.cuda.is_available() else SMALL


def text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
