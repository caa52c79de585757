"""What each figure of a visit should be on an H200, before anything was measured: from bytes, FLOPs and machine code.

    python -m bench.visit.estimates > bench/predictions.json

Every estimate is a time and one line that contains its arithmetic. Rates that others measured: a copy of 4.3 TB/s, read
and write together, and 770 TFLOP/s of a bfloat16 product 8192 cubed. The rest are assumptions, all of them here. Bytes
and FLOPs are those of the step model (`python -m bench.step_model.step_model --preset pr1855`, 98,304 tokens), of the
kernels' VARIANTS and of the benchmarks' own counts. The file is not made anew when these change: it says what was
expected before the visit.
"""

import json
import math
import sys

COPY, PRODUCT = 4.3, 770.0  # TB/s, TFLOP/s: measured by others
STREAM = 0.85 * COPY  # TB/s of our kernels without products: 85% of a copy
COMPILED = 0.78 * COPY  # of Inductor's, many of which reduce a row in two passes
LIBRARY = {
    512: 560.0,
    2048: 640.0,
    8192: 690.0,
    98_304: 560.0,
}  # TFLOP/s of cuBLAS by the inner size; the last is split
OURS = 0.82  # of the library's rate at inner size 512: 60% of a large product's, as there is an epilogue every 8 steps
FLASH2 = {"forward": 210.0, "backward": 190.0}  # TFLOP/s, head size 64, causal, about 1,400 tokens
FLASH3 = {"forward": 320.0, "backward": 270.0}
LAUNCH_MS = 0.0015  # between two kernels of a step that the host runs ahead of
SMALL_MS = 0.0045  # a kernel too small to fill the device, with the gap behind it, in a graph

TOKENS, DIM, HIDDEN, VOCABULARY = 98_304, 512, 2048, 8192
X = TOKENS * DIM * 2  # bytes of one stream
PRODUCTS = {"qkv": (512, 1088), "q": (512, 512), "k": (512, 256), "o": (512, 512), "up": (512, 2048),
            "down": (2048, 512), "head": (512, 8192)}  # fmt: skip
# Tokens that a query's causal half reaches, twice: sum of squares over tokens of documents of 950 tokens on average
# (geometric), cut at 2,048: 2·950²·(1 - e^-c·(1 + c)) / (1 - e^-c) / 950 with c = 2048/950.
REACH = 2 * 950 * (1 - math.exp(-2048 / 950) * (1 + 2048 / 950)) / (1 - math.exp(-2048 / 950))
ATTENTION_GFLOP = {"forward": 4 * 512 * TOKENS * REACH / 2 / 1e9, "backward": 10 * 512 * TOKENS * REACH / 2 / 1e9}

Estimate = tuple[float, str]


def moved(size: float, rate: float = STREAM, what: str = "our kernels") -> Estimate:
    """Milliseconds to move `size` bytes at `rate` TB/s."""
    ms = size / rate / 1e9
    return ms, f"{size / 1e9:.3g} GB at {rate:.3g} TB/s ({what}) = {ms:.3g} ms"


def product(rows: int, columns: int, inner: int) -> Estimate:
    """cuBLAS, bfloat16: FLOPs at the rate of the inner size, and a quarter of the bytes' time, which is not hidden."""
    gigaflops, size = 2 * rows * columns * inner / 1e9, 2 * (rows * columns + rows * inner + columns * inner)
    tiles = math.ceil(columns / 128) * 128 / columns if columns > 128 else 1.0
    rate = LIBRARY[min(LIBRARY, key=lambda k: abs(math.log(k / inner)))]
    ms = gigaflops * tiles / rate + size / COPY / 1e9 / 4
    padding = f" x {tiles:.3g} (tiles of 128)" if tiles > 1 else ""
    return (
        ms,
        f"{gigaflops:.4g} GFLOP{padding} / {rate:.0f} TFLOP/s "
        f"+ a quarter of {size / 1e9:.3g} GB / {COPY} TB/s = {ms:.3g} ms",
    )


def mlp_kernel(gradient: bool) -> Estimate:
    gigaflops, rate = 2 * TOKENS * DIM * HIDDEN / 1e9, OURS * LIBRARY[512]
    size = X + TOKENS * HIDDEN * 2 * (2 if gradient else 1)
    ms = gigaflops / rate + size / COPY / 1e9 / 4
    return (
        ms,
        f"{gigaflops:.4g} GFLOP / {rate:.0f} TFLOP/s + a quarter of {size / 1e9:.3g} GB / {COPY} TB/s = {ms:.3g} ms",
    )


def step_product(name: str, direction: str) -> Estimate:
    inputs, outputs = PRODUCTS[name]
    shape = {"forward": (TOKENS, outputs, inputs), "dX": (TOKENS, inputs, outputs), "dW": (outputs, inputs, TOKENS)}
    return product(*shape[direction])


def ceilings() -> dict[str, Estimate]:
    found = {
        "copy": moved(2 * 2**30, COPY, "1 GiB read and written, as others measured"),
        "product 8192": (
            2 * 8192**3 / PRODUCT / 1e9,
            f"2·8192³ = 1100 GFLOP / {PRODUCT:.0f} TFLOP/s, as others measured",
        ),
        "host launch torch": (0.006, "dispatcher 2 us, launch 2.5 us, Python 1.5 us"),
        "host launch newton_schulz, 5 steps": (
            0.65,
            "10 symmetric products of 3 to 4 descriptors x 50 us + 2 plain Triton launches x 25 us "
            "+ 5 bmm x 9 us + 50 us",
        ),
    }
    for name in PRODUCTS:
        for direction in ("forward", "dX", "dW"):
            found[f"product {name} {direction}"] = step_product(name, direction)
    for backend, rates in (("varlen", FLASH2), ("flash3", FLASH3)):  # of flash4 on sm_90 nothing is known
        for heads in (4, 8):
            for direction, rate in rates.items():
                found[f"attention {backend} {heads} heads {direction}"] = attention(direction, rate, heads)
    return found


def attention(direction: str, rate: float, heads: int) -> Estimate:
    gigaflops = ATTENTION_GFLOP[direction]
    ms = gigaflops / rate
    why = f"{gigaflops:.3g} GFLOP ({REACH:.0f} tokens of reach, causal half) / {rate:.0f} TFLOP/s"
    if heads == 4 and direction == "backward":  # gradients a query head, then a sum over two of them
        extra = 2 * X * 1.5 / STREAM / 1e9
        ms, why = ms + extra, f"{why} + 0.3 GB to add up dK and dV of two heads / {STREAM:.3g} TB/s"
    return ms, f"{why} = {ms:.3g} ms"


# Of the step model: visits of layers; GB of the glue and of casts of weights, plain and fused; kernels.
PHASES = {
    "loop": (17, {"plain": 38.78 + 60.65 + 0.59, "fused": 26.72 + 41.52 + 0.61}, {"plain": 919, "fused": 503}),
    "first": (11, {"plain": 25.35 + 39.92 + 0.56, "fused": 17.33 + 27.51 + 0.59}, {"plain": 663, "fused": 378}),
}


def step(phase: str, form: str) -> dict[str, Estimate]:
    """{"" the step, "products", "glue", "attention", "MLP", "loss", "optimiser"}."""
    layers, glue, kernels = PHASES[phase]
    of = {(name, way): step_product(name, way)[0] for name in PRODUCTS for way in ("forward", "dX", "dW")}
    of_all = {name: sum(of[name, way] for way in ("forward", "dX", "dW")) for name in PRODUCTS}
    joined = form == "fused"
    projections = of_all["qkv"] + of_all["o"] if joined else 2 * of_all["q"] + 2 * of_all["k"]
    backward_up = of["up", "dX"]
    products = layers * (projections + backward_up) + of_all["head"]
    inside = mlp_kernel(False)[0] + mlp_kernel(True)[0] + of["down", "forward"] + of["up", "dW"] + of["down", "dW"]
    ways = {way: attention(way, rate, 4)[0] for way, rate in FLASH2.items()}
    how = "q+k+v+gate as one, and o" if joined else "q, k, v, o apart"
    found = {
        "products": (
            products,
            f"{layers} x ({how} {projections:.3g} + dX of up {backward_up:.3g}) "
            f"+ head {of_all['head']:.3g}, each as its own ceiling",
        ),
        "glue": moved(1e9 * glue[form], STREAM if joined else COMPILED, "with casts of weights"),
        "attention": (
            layers * sum(ways.values()),
            f"{layers} x (forward {ways['forward']:.3g} + backward {ways['backward']:.3g}), "
            "4 heads of K and V not expanded",
        ),
        "MLP": (
            layers * inside,
            f"{layers} x (up {mlp_kernel(False)[0]:.3g} + down {of['down', 'forward']:.3g} "
            f"+ gradient {mlp_kernel(True)[0]:.3g} "
            f"+ two dW {of['up', 'dW'] + of['down', 'dW']:.3g})",
        ),
        "loss": (
            cross_entropy(False)[0] + cross_entropy(True)[0],
            f"losses {cross_entropy(False)[0]:.3g} in the forward, "
            f"gradient {cross_entropy(True)[0]:.3g} in the backward",
        ),
        "optimiser": (
            NEWTON["all banks"][0] + 1.74 / STREAM + 0.2,
            f"Newton-Schulz of all banks {NEWTON['all banks'][0]:.3g} "
            f"+ 1.74 GB of state / {STREAM:.3g} TB/s + 0.2 of small kernels",
        ),
    }
    gaps = kernels[form] * LAUNCH_MS
    total = sum(ms for ms, _ in found.values()) + gaps
    parts = " + ".join(f"{name} {ms:.3g}" for name, (ms, _) in found.items())
    return {"": (total, f"{parts} + {kernels[form]} gaps of {1e3 * LAUNCH_MS:.1f} us"), **found}


def steps() -> dict[str, Estimate]:
    found = {}
    for phase in PHASES:
        for form in ("plain", "fused"):
            for part, estimate in step(phase, form).items():
                found[f"{phase} {form}{'/' * bool(part)}{part}"] = estimate
    total, gaps = found["loop fused"][0], PHASES["loop"][2]["fused"] * LAUNCH_MS
    found["loop fused graphs"] = (
        total - 0.6 * gaps,
        f"fused {total:.4g} - 60% of its gaps {gaps:.2g}: the host was ahead already",
    )
    return found


def cross_entropy(gradient: bool) -> Estimate:
    size = (2 if gradient else 1) * TOKENS * VOCABULARY * 2
    special = 2.5 * TOKENS * VOCABULARY / (16 * 132 * 1.755e9) * 1e3
    ms = size / STREAM / 1e9 + 0.15 * special
    return ms, f"{size / 1e9:.3g} GB / {STREAM:.3g} TB/s + 15% of {special:.2g} ms of special functions = {ms:.3g} ms"


def chain(square: int, small: int, tall: int, banks: float, extra: str) -> Estimate:
    """A chain of kernels that wait for each other: products of full banks, small ones, those with 2,048 inside."""
    ms = square * 0.0065 + small * SMALL_MS + tall * 0.013 + banks / STREAM / 1e9
    size = f"{banks / 1e6:.3g} MB of normalising and copies" if banks else "no copies"
    return (
        ms,
        f"{square} products of 220 tiles x 6.5 us + {small} small kernels x 4.5 us "
        f"+ {tall} with 2,048 inside x 13 us + {size}{extra} = {ms:.3g} ms",
    )


BANK = 22 * 512 * 512 * 2  # bytes in 16 bits; all four banks are of it or half of it
_APART = {
    "q and o": chain(15, 3, 0, 5 * BANK, ""),
    "k and v": chain(3, 21, 0, 2.5 * BANK, ""),
    "up": chain(2, 16, 6, 10 * BANK, ""),
    "down": chain(2, 16, 6, 10 * BANK, ""),
}
NEWTON: dict[str, Estimate] = {
    **_APART,
    "all banks": (
        sum(ms for ms, _ in _APART.values()),
        "one after another: " + " + ".join(f"{name} {ms:.2g}" for name, (ms, _) in _APART.items()),
    ),
    "one rank's eighth": chain(0, 18 + 24 + 18 + 18, 12, 2.5 * BANK, ""),
}


def operations() -> dict[str, Estimate]:
    """Ours alone, as the benchmarks name them."""
    forms = {  # streams moved forward, and with the backward
        "residual_rms_norm": {"add": (4, 8), "mix": (4, 10), "add + mix": (5, 12), "add + mix + skip": (6, 15)},
        "qk_norm_rope": {"16 of 64 rotate": (3, 7.5)},
        "qkv_norm_rope": {"of one product, 16 of 64 rotate": (3, 9.2)},
        "xsa_gate": {"with gate": (2.5, 6.6)},
        "two_lane_rms_norm": {"lanes part + skip": (8, 20), "two lanes + skip": (10, 26)},
        "embedding_smear_norm": {"smeared": (1.1, 4.9)},
    }
    found = {}
    for operation, cases in forms.items():
        for case, sizes in cases.items():
            for direction, count in zip(("forward", "forward + backward"), sizes, strict=True):
                ms, why = moved(count * X, STREAM, f"{count:g} streams of {X / 1e6:.0f} MB")
                found[f"{operation}/{case}, {direction}"] = (
                    ms + SMALL_MS,
                    f"{why} + {1e3 * SMALL_MS:.1f} us of small kernels",
                )
    found |= {f"leaky_relu2_mlp/{case}": estimate for case, estimate in mlp_cases().items()}
    found["leaky_relu2_mlp stack/forward + backward"] = stack()
    for case, gradient in (("forward", False), ("forward + backward", True)):
        found[f"softcapped_cross_entropy/{case}"] = cross_entropy(gradient)
    found["linear_softcapped_cross_entropy/forward + backward"] = joined_loss()
    for case, (ms, why) in NEWTON.items():
        found[f"newton_schulz/{case}"] = ms, why
        found[f"newton_schulz/{case}, quintic"] = ms, f"the same schedule as polar_express: {why}"
    for bits in (4, 6, 8):
        size = 22 * 512 * 512 * (2 + bits / 8)
        ms = size / STREAM / 1e9 + SMALL_MS
        found[f"unpack_dequantize/{bits} bits"] = (
            ms,
            f"{size / 1e6:.3g} MB / {STREAM:.3g} TB/s + {1e3 * SMALL_MS:.1f} us of starting = {ms:.2g} ms",
        )
    return found


def mlp_cases() -> dict[str, Estimate]:
    down = step_product("down", "forward")[0]
    forward = mlp_kernel(False)[0] + down
    weights = step_product("up", "dW")[0] + step_product("down", "dW")[0]
    backward = mlp_kernel(True)[0] + weights + step_product("up", "dX")[0]
    both = (
        forward + backward,
        f"forward {forward:.3g} + gradient {mlp_kernel(True)[0]:.3g} "
        f"+ two dW {weights:.3g} + dX {step_product('up', 'dX')[0]:.3g}",
    )
    return {
        "forward": (forward, f"up {mlp_kernel(False)[0]:.3g} + down {down:.3g}"),
        "forward + backward": both,
        "relu², forward + backward": both,
    }


def stack() -> Estimate:
    block, norm = mlp_cases()["forward + backward"][0], 7 * X / COMPILED / 1e9
    return 11 * (
        block + norm
    ), f"11 x (MLP {block:.3g} + norm and sum, 7 streams of {X / 1e6:.0f} MB / {COMPILED:.3g} TB/s = {norm:.2g})"


def joined_loss() -> Estimate:
    products = sum(step_product("head", way)[0] for way in ("forward", "dX", "dW"))
    special = 2.5 * TOKENS * VOCABULARY / (16 * 132 * 1.755e9) * 1e3
    ms = 1.25 * products + 1.6 * special
    return (
        ms,
        f"the head's products {products:.3g} x 1.25 (64 chunks of 1,536 tokens) "
        f"+ loss in the L2 cache, 1.6 x {special:.2g} ms of special functions",
    )


def everything() -> dict[str, dict[str, float | str]]:
    parts = {"ceilings": ceilings(), "step": steps(), "operations": operations()}
    return {
        f"{part}/{name}": {"ms": float(f"{ms:.3g}"), "why": why}
        for part, estimates in parts.items()
        for name, (ms, why) in estimates.items()
    }


if __name__ == "__main__":
    json.dump(everything(), sys.stdout, indent=1, ensure_ascii=False)
    print()
