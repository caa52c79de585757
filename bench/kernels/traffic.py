"""Bytes that whole operations move at the record's shape, forward and backward, beside the schemes that they replace.

A product reads each operand and writes its result once. What our kernels move is taken from their `VARIANTS`; the
products of the device's library are counted by that rule. `python -m bench.kernels.static_report` prints the table.
"""

import re
from dataclasses import dataclass

from bench.kernels import aot

TOKENS, SIZE, HIDDEN, CLASSES, ITEM = 98_304, 512, 2048, 8192, 2  # bfloat16
X, H, W = TOKENS * SIZE * ITEM, TOKENS * HIDDEN * ITEM, SIZE * HIDDEN * ITEM
LOGITS, HEAD = TOKENS * CLASSES * ITEM, CLASSES * SIZE * ITEM


@dataclass(frozen=True)
class Scheme:
    """One operation, computed one way and, for comparison, another. Saved: from forward to backward, no weights."""

    name: str
    bytes_moved: int
    saved_bytes: int
    other: str
    other_bytes: int
    other_saved_bytes: int

    @property
    def ratio(self) -> float:
        return self.bytes_moved / self.other_bytes

    @property
    def saved_ratio(self) -> float:
        return self.saved_bytes / self.other_saved_bytes


def schemes() -> list[Scheme]:
    kernels = {variant.name: variant.bytes_moved for variant in aot.variants()}
    mlp = f"bf16 {TOKENS}x{SIZE}x{HIDDEN}"
    fused = kernels[f"leaky_relu2_mlp up {mlp}"] + kernels[f"leaky_relu2_mlp gradient {mlp}"]
    product = X + W + H  # down, dw_down, dx, dw_up: each touches these three
    loss = kernels[f"softcapped_cross_entropy forward + gradient bf16 {TOKENS}x{CLASSES}"]
    loss_twice = 3 * LOGITS + 2 * 12 * TOKENS  # logits read in both passes, targets and one float a token too
    # Head and loss: three products touch hidden (or its gradient), weight and logits each. By chunks that stay in the
    # L2 cache, memory sees hidden and its gradient, and both weights, the gradient's in float32.
    two_steps = 3 * (X + HEAD + LOGITS) + loss
    chunks = 2 * X + HEAD + 2 * HEAD + 12 * TOKENS
    return [
        Scheme("leaky_relu2_mlp", fused + 4 * product, X + H, "two hidden tensors", fused + H + 4 * product, X + 2 * H),
        Scheme("softcapped_cross_entropy", loss, LOGITS, "logits read twice", loss_twice, LOGITS),
        Scheme("softcapped_cross_entropy", loss, LOGITS, "floor: logits once in, once out", 2 * LOGITS, LOGITS),
        Scheme("linear_softcapped_cross_entropy", chunks, X + 2 * HEAD, "product, then loss", two_steps, X + LOGITS),
        *_glue_schemes(kernels),
    ]


# What torch.compile of the model's plain functions moves and keeps, in X, as compiled_traffic.py counts it.
COMPILED_X = {
    "add": (9, 1),
    "mix": (13, 3),
    "add + mix": (15, 3),
    "add + mix + skip": (18, 4),
    "qk_norm_rope": (19.3, 2.6),
    "qkv_norm_rope": (26.5, 2.6),
    "xsa_gate": (12.3, 1.5),
    "lanes part": (25, 4),
    "two lanes": (40, 7),
    "two lanes + skip": (48, 8),
    "lanes merge": (29, 4),
    "embedding": (14.9, 2),
}
# The sum by row of the table, torch's embedding_dense_backward: rows read, the table zeroed and written, sums of up
# to ten rows in float32 written and read, of which there are at most tokens / 10 and one for each row of the table.
SCATTER_X = 1.9


def _glue_schemes(kernels: dict[str, int]) -> list[Scheme]:
    def scheme(label: str, compiled: str, saved: float, form: str, more: float = 0.0) -> Scheme:
        moved = sum(size for name, size in kernels.items() if re.fullmatch(form, name)) + round(more * X)
        others = (round(count * X) for count in COMPILED_X[compiled])
        return Scheme(label, moved, round(saved * X), "compiled plain functions", *others)

    shape = f"bf16 {TOKENS}x{SIZE}"
    return [
        *(
            scheme(f"residual_rms_norm {form}", form, saved, f"residual_rms_norm {re.escape(form)} \\w+ {shape}")
            for form, saved in (("add", 1), ("mix", 2), ("add + mix", 3), ("add + mix + skip", 4))
        ),
        scheme("qk_norm_rope", "qk_norm_rope", 1.5, r"qk_norm_rope \w+ .*, 16 rotate"),
        scheme(
            "qkv_norm_rope",
            "qkv_norm_rope",
            1088 / 512,
            r"qk_norm_rope forward .*, 16 rotate, of .*|qkv_norm_rope backward .*x1088, 16 .*",
        ),
        scheme("xsa_gate", "xsa_gate", 1.5, r"xsa_gate \w+ bf16.* values"),
        scheme("two_lane_rms_norm part", "lanes part", 4, r"two_lane_rms_norm part .*"),
        scheme("two_lane_rms_norm route", "two lanes", 5, r"two_lane_rms_norm route \+ mix .*"),
        scheme("two_lane_rms_norm route + skip", "two lanes + skip", 6, r"two_lane_rms_norm route \+ skip .*"),
        scheme("residual_rms_norm merge", "lanes merge", 4, r"residual_rms_norm merge .*"),
        scheme("embedding_smear_norm", "embedding", 0.09, r"embedding_smear_norm .*", SCATTER_X),
    ]


def text_table() -> list[str]:
    header = ("operation, forward + backward", "GB", "saved GB", "beside", "GB", "saved GB", "bytes", "saved")
    cells = [
        (
            scheme.name,
            f"{scheme.bytes_moved / 1e9:.2f}",
            f"{scheme.saved_bytes / 1e9:.2f}",
            scheme.other,
            f"{scheme.other_bytes / 1e9:.2f}",
            f"{scheme.other_saved_bytes / 1e9:.2f}",
            f"{scheme.ratio:.3f}x",
            f"{scheme.saved_ratio:.3f}x",
        )
        for scheme in schemes()
    ]
    widths = [max(len(line[column]) for line in (header, *cells)) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if column in (0, 3) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (header, *cells)
    ]
