"""Muon over several processes: even work, one result at every number of ranks, and a clear end when a rank fails."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from bench.studies.balance import RECORD, balance_table
from pgolf.runtime.ranks import Ranks
from pgolf.training import sharding
from pgolf.training.muon import Muon
from pgolf.training.optim import Optimisers

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BANKS = [(5, 8, 8), (7, 4, 8), (3, 16, 8), (3, 8, 16), (2, 8, 8)]  # two of one shape
MIXED = [*BANKS, (8, 8), (12, 4)]  # matrices among the banks: banks of one
FEW = [(1, 8, 8), (4, 8)]  # from three ranks on, some have no matrix
SMALL = [(10, 8), (3,), (2, 4)]
CLIP = 2.0
STEPS = 4
WORLD_SIZES = (1, 2, 3, 4, 5)
SAVED_BY, SAVED_AFTER, LOADED_BY = 3, 2, (1, 2)


# Balance


def test_record_banks_are_within_five_percent_of_even_on_eight_ranks():
    loads = sharding.loads(RECORD, 8)
    assert max(loads) < 1.05 * sum(loads) / 8
    plan = sharding.Plan(RECORD, 8)
    assert plan.length * 8 < 1.10 * sum(math.prod(shape) for shape in RECORD)  # bytes padded


@pytest.mark.parametrize("world_size", range(1, 17))
def test_every_matrix_has_one_owner_and_no_rank_has_much_more(world_size):
    counts = sharding.assign(RECORD, world_size)
    assert [sum(row) for row in counts] == [shape[0] for shape in RECORD]
    loads = sharding.loads(RECORD, world_size)
    assert max(loads) <= max(1.05 * sum(loads) / world_size, 1.02 * sharding.least_possible(RECORD, world_size))


def test_where_greed_is_not_enough_ranks_are_filled_one_by_one(monkeypatch):
    shapes = [(3, 1, 5), (4, 1, 3), (1, 1, 9)]
    monkeypatch.setattr(sharding, "cost", lambda shape, steps: shape[1] * shape[2])
    sharding._assign.cache_clear()
    costs = [5, 3, 9]
    counts = sharding._by_filling(shapes, costs, 2, capacity=18)
    assert sharding._sums(counts, costs) == [18, 18]
    assert sharding._by_filling(shapes, costs, 2, capacity=17) is None
    assert max(sharding.loads(shapes, 2)) == 18
    sharding._assign.cache_clear()


def test_the_balance_table_has_a_line_for_each_number_of_ranks():
    lines = balance_table(RECORD).splitlines()
    assert len(lines) == 2 + 16
    assert lines[2 + 7].startswith("| 8 |")


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 16, 40])
def test_cuts_cover_every_element_once(world_size):
    plan = sharding.Plan(BANKS, world_size)
    for bounds in (plan.scatter_bounds(), plan.gather_bounds()):
        assert bounds[-1] == plan.length
        assert bounds == sorted(bounds)
        in_banks = [torch.zeros(math.prod(shape)) for shape in BANKS]
        in_buffer = torch.zeros(plan.length * world_size)
        for cut in (cut for cuts in plan.cuts(bounds) for cut in cuts):
            in_banks[cut.bank][cut.start : cut.stop] += 1
            in_buffer[cut.at : cut.at + cut.stop - cut.start] += 1
        assert all(bool((x == 1).all()) for x in in_banks)
        assert float(in_buffer.max()) == 1


# One result


def parameters(shapes: list[tuple[int, ...]]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return tuple([nn.Parameter(torch.randn(shape, generator=generator)) for shape in part] for part in (shapes, SMALL))


def set_gradients(parameters: list[nn.Parameter], step: int, rank: int, world_size: int) -> None:
    """The ranks' gradients add up to the same at every world size, up to rounding."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in parameters:
        whole = torch.randn(p.shape, generator=generator)
        noise = torch.randn((world_size, *p.shape), generator=torch.Generator().manual_seed(step))
        p.grad = whole / world_size + noise[rank] - noise.mean(0)


def make(ranks: Ranks, dtype: torch.dtype = torch.float32, clip: float = CLIP, shapes=MIXED):
    banks, small = parameters(shapes)
    rates = [torch.linspace(0.5, 2.0, len(sharding.as_bank(bank))) for bank in banks]
    muon = Muon(
        banks, lr=0.02, weight_decay=0.1, row_normalize=True, dtype=dtype, beta2=0.9, lr_multipliers=rates, ranks=ranks
    )
    return banks + small, Optimisers(muon, torch.optim.AdamW(small, lr=0.01, fused=True), clip)


def train(ranks: Ranks, steps: int, first: int = 0, state=None, **options):
    """(weights, optimisers, losses) after `steps`; `state` is what went before: (weights, optimisers' state)."""
    weights, optimisers = make(ranks, **options)
    if state is not None:
        with torch.no_grad():
            for p, before in zip(weights, state[0], strict=True):
                p.copy_(before)
        optimisers.load_state_dict(state[1])
    losses = []
    for step in range(first, first + steps):
        set_gradients(weights, step, ranks.rank, ranks.world_size)
        optimisers.set_rates(1.0 - 0.1 * step, momentum=0.9 + 0.01 * step)
        losses.append(float(optimisers.step(torch.tensor(1.0 + ranks.rank))))
    return [p.detach() for p in weights], optimisers, losses


def everything(ranks: Ranks, folder: Path) -> None:
    """What one process does at one world size; what it leaves in `folder` is compared later."""
    weights, optimisers, losses = train(ranks, STEPS)
    rounded, _, _ = train(ranks, STEPS, dtype=torch.bfloat16, clip=0.0)
    assert optimisers.muon.momentum.data.numel() < 1.3 * sum(map(math.prod, MIXED)) / ranks.world_size + 128
    few, _, _ = train(ranks, STEPS, shapes=FEW)
    banks_of_one, _, _ = train(ranks, STEPS, shapes=[shape if len(shape) == 3 else (1, *shape) for shape in MIXED])
    assert all(torch.equal(one, other.view_as(one)) for one, other in zip(weights, banks_of_one, strict=True))
    torch.save((weights + few, rounded, losses), folder / f"{ranks.world_size}-{ranks.rank}.pt")
    if ranks.world_size == SAVED_BY:
        weights, optimisers, _ = train(ranks, SAVED_AFTER)
        state = optimisers.state_dict()
        if ranks.first:
            torch.save((weights, state), folder / "state.pt")


def work(rank: int, folder: Path) -> None:
    """Process `rank` of the largest world, which is in the smaller ones too."""
    torch.set_num_threads(1)
    for world_size in WORLD_SIZES:
        if rank < world_size:
            if world_size > 1:
                store = f"file://{folder}/store-{world_size}"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
            everything(Ranks(rank, world_size, CPU), folder)
            if world_size > 1:
                dist.destroy_process_group()
    for world_size in LOADED_BY:
        if rank < world_size:
            while not (folder / "state.pt").exists():
                time.sleep(0.05)
            if world_size > 1:
                store = f"file://{folder}/again-{world_size}"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
            state = torch.load(folder / "state.pt")
            weights, _, _ = train(Ranks(rank, world_size, CPU), STEPS - SAVED_AFTER, first=SAVED_AFTER, state=state)
            torch.save(weights, folder / f"resumed-{world_size}-{rank}.pt")
            if world_size > 1:
                dist.destroy_process_group()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    mp.spawn(work, (folder,), nprocs=max(WORLD_SIZES))
    return folder


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_one_result_at_every_number_of_ranks(worlds, world_size):
    alone, _, _ = torch.load(worlds / "1-0.pt")
    weights, _, losses = torch.load(worlds / f"{world_size}-0.pt")
    for one, many in zip(alone, weights, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-6, atol=1e-6)
    assert losses == [sum(range(1, world_size + 1))] * STEPS


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_all_ranks_hold_the_same_bits(worlds, world_size):
    first = torch.load(worlds / f"{world_size}-0.pt")
    for rank in range(1, world_size):
        other = torch.load(worlds / f"{world_size}-{rank}.pt")
        for mine, theirs in zip(first[0] + first[1], other[0] + other[1], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("world_size", LOADED_BY)
def test_state_of_three_ranks_goes_on_in_fewer(worlds, world_size):
    whole, _, _ = torch.load(worlds / f"{SAVED_BY}-0.pt")
    for rank in range(world_size):
        resumed = torch.load(worlds / f"resumed-{world_size}-{rank}.pt")
        for one, two in zip(whole[: len(resumed)], resumed, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6)


def test_clipping_is_that_of_one_process_in_plain_pytorch():
    ranks = Ranks(0, 1, CPU)
    weights, _, _ = train(ranks, 1)
    expected, optimisers = make(ranks, clip=0.0)
    set_gradients(expected, 0, 0, 1)
    norm = torch.nn.utils.clip_grad_norm_(expected, CLIP)
    assert norm > 2 * CLIP
    optimisers.set_rates(1.0, momentum=0.9)
    optimisers.step(torch.tensor(0.0))
    for one, two in zip(expected, weights, strict=True):
        torch.testing.assert_close(two, one.detach(), rtol=1e-6, atol=1e-6)


# Rank failure


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_others_with_one_line(tmp_path, tiny_environ, number):
    """Killed, its connections close; stopped, it does not answer in time."""
    timeout = {signal.SIGKILL: "60", signal.SIGSTOP: "4"}[number]
    environ = {
        **os.environ,
        **tiny_environ,
        "PYTHONPATH": str(ROOT),
        "RUN_ID": "lost",
        "OUT_DIR": str(tmp_path),
        "ITERATIONS": "100000",
        "TRAIN_LOG_EVERY": "1",
        "PROCESS_TIMEOUT_SECONDS": timeout,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's, on a free port
    environ |= {"MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train_gpt.py")],
            env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        log = tmp_path / "lost" / "train.log"
        deadline = time.monotonic() + 60
        while not (log.exists() and "step:3/" in log.read_text(encoding="utf-8")):
            assert all(process.poll() is None for process in processes), processes[0].communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        processes[1].send_signal(number)
        _, message = processes[0].communicate(timeout=20)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 2, message
    (line,) = (line for line in message.splitlines() if line.startswith("train_gpt.py: "))
    assert line.startswith("train_gpt.py: rank 0 lost a fellow process during step ")
    assert "Traceback" not in message
