"""What the device reaches with nothing of ours: copies, the step's matrix products, attention, the host's launches.

    python -m bench.visit.ceilings [--attention NAME] [--quick]

Every figure is a median in milliseconds, of a call captured in a graph where that works, on inputs larger than the
cache in alternation. With `--attention` that backend alone, which is tried with a few tokens first.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness.measure import captured, input_sets, seconds_per_call
from bench.visit import facts
from bench.visit.turns import turn
from pgolf.model.attention import attention, choose_attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
TOKENS, DIM, HIDDEN, VOCABULARY, ONE_PRODUCT = 98_304, 512, 2048, 8192, 1088
HEADS, HEAD_DIM = 8, 64
DOCUMENT, LONGEST = (950, 2048) if CUDA else (64, 128)  # tokens on average, at most
PRODUCTS = {  # of the step: columns in and out
    "up": (DIM, HIDDEN),
    "down": (HIDDEN, DIM),
    "head": (DIM, VOCABULARY),
    "qkv": (DIM, ONE_PRODUCT),
    "q": (DIM, DIM),
    "o": (DIM, DIM),
    "k": (DIM, DIM // 2),
}
COPY_BYTES = 1 << 30
ROUNDS = 30


def median_ms(call: Callable, make: Callable[[], tuple], rounds: int, capture: bool = True) -> tuple[float, float, str]:
    """(median, least, "graph" or "calls") of one call."""
    timed = seconds_per_call(DEVICE)
    sets = input_sets(make, DEVICE)
    for _ in range(2):
        timed(call, *sets[0])
    replays = captured(call, sets) if CUDA and capture else None
    ways: list[tuple] = [(replay,) for replay in replays] if replays else [(call, *arguments) for arguments in sets]
    times = [1e3 * timed(*ways[index % len(ways)]) for index in range(rounds)]
    return statistics.median(times), min(times), "graph" if replays else "calls"


def keep(
    name: str, call: Callable, make: Callable[[], tuple], rounds: int, capture: bool = True, **work: float
) -> None:
    """One fact, or the reason why there is none: another figure may still come."""
    try:
        ms, least, how = median_ms(call, make, rounds, capture)
    except Exception as error:  # of somebody else's library
        facts.add(name, error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return
    rates = {f"t{unit}_per_s": amount / ms / 1e9 for unit, amount in work.items()}
    facts.add(name, ms=ms, least_ms=least, timed=how, **rates)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def measure_copy(size: int, rounds: int) -> None:
    keep("copy", lambda target, source: target.copy_(source), lambda: (random(size // 2), random(size // 2)), rounds,
         bytes=2 * size * DTYPE.itemsize / 2)  # fmt: skip


def measure_products(tokens: int, rounds: int) -> None:
    square = 8192 if CUDA else 256
    keep(
        f"product {square}",
        torch.mm,
        lambda: (random(square, square), random(square, square)),
        rounds,
        flop=2 * square**3,
    )
    for name, (inputs, outputs) in PRODUCTS.items():
        flops = 2 * tokens * inputs * outputs
        cases = {  # weights lie as (outputs, inputs)
            "forward": (lambda x, w: x @ w.mT, lambda i=inputs, o=outputs: (random(tokens, i), random(o, i))),
            "dX": (torch.mm, lambda i=inputs, o=outputs: (random(tokens, o), random(o, i))),
            "dW": (lambda g, x: g.mT @ x, lambda i=inputs, o=outputs: (random(tokens, o), random(tokens, i))),
        }
        for case, (call, make) in cases.items():
            keep(f"product {name} {case}", call, make, rounds, flop=flops)


def random_borders(tokens: int) -> list[int]:
    """Of documents of random lengths, cut at `LONGEST` as the loader cuts them."""
    starts = sorted({0, *torch.randint(1, tokens, (tokens // DOCUMENT,)).tolist(), tokens})
    return [cut for a, b in itertools.pairwise(starts) for cut in range(a, b, LONGEST)] + [tokens]


def measure_attention(backend: str, tokens: int, rounds: int) -> None:
    """Documents of `DOCUMENT` tokens on average, forward and backward, with 4 and with 8 key and value heads."""
    try:
        chosen = choose_attention(backend, torch.device(DEVICE), DTYPE, LONGEST)
    except Exception as error:  # it is not here, or not for this device
        facts.add(f"attention {backend}", error=str(error).splitlines()[0])
        return
    borders = random_borders(tokens)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=DEVICE)
    longest = max(b - a for a, b in itertools.pairwise(borders))
    products = 4 * HEADS * HEAD_DIM * sum((b - a) ** 2 for a, b in itertools.pairwise(borders)) / 2

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, cu_seqlens, longest, chosen)

    def backward(y: Tensor, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (q, k, v), upstream, retain_graph=True)

    for kv_heads in (4, 8):

        def inputs(kv_heads: int = kv_heads) -> tuple[Tensor, ...]:
            return tuple(random(1, tokens, heads, HEAD_DIM).requires_grad_() for heads in (HEADS, kv_heads, kv_heads))

        def after_forward(inputs: Callable = inputs) -> tuple[Tensor, ...]:
            q, k, v = inputs()
            y = attend(q, k, v)
            return y, q, k, v, torch.randn_like(y)

        name = f"attention {chosen} {kv_heads} heads"
        keep(f"{name} forward", lambda *t: attend(*(x.detach() for x in t)), inputs, rounds, flop=products)
        # It runs on the stream of its forward pass, which is over: a graph of its own could not hold it.
        keep(f"{name} backward", backward, after_forward, rounds, capture=False, flop=2.5 * products)


def measure_launches(rounds: int) -> None:
    """Milliseconds of the host a launch: of torch's smallest kernel, and of one of ours with TMA descriptors."""
    from pgolf import ops

    small, bank = random(1), random(1, 64, 64)
    with torch.no_grad():
        calls: dict[str, Callable] = {
            "torch": lambda: small.add_(1),
            "newton_schulz, 5 steps": lambda: ops.newton_schulz(bank),
        }
        for name, call in calls.items():
            call()
            times = []
            for _ in range(rounds):
                if CUDA:
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - begin))
            facts.add(f"host launch {name}", ms=statistics.median(times), least_ms=min(times))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What the device reaches with nothing of ours.")
    parser.add_argument("--attention", help="this backend alone")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    tokens, rounds = (512, 2) if options.quick else (TOKENS, ROUNDS)
    torch.set_float32_matmul_precision("high")
    with turn():
        if options.attention:
            measure_attention(options.attention, 1024, 2)
            measure_attention(options.attention, tokens, rounds)
            return 0
        measure_copy(1 << 20 if options.quick else COPY_BYTES, rounds)
        measure_products(tokens, rounds)
        measure_attention("varlen" if CUDA else "plain", tokens, rounds)
        measure_launches(20 * rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
