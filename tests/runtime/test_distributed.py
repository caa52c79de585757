"""How ranks wait for one that works alone. tests/training/test_sharding.py stops one for real."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pgolf.errors import UserError
from pgolf.runtime.ranks import LostProcess, Ranks, launch

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


class Sent:
    def __init__(self, error: str = ""):
        self.error = error

    def wait(self):
        if self.error:
            raise RuntimeError(self.error)


def test_each_sign_of_life_is_a_message_of_its_own(monkeypatch):
    """So that the limit of one answer counts from the last sign, however long the first rank works."""
    signs = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, root, async_op: signs.append(float(tensor)) or Sent())
    first = Ranks(0, 2, CPU)
    for _ in range(3):
        first.alive()
    first.alive(done=True)
    assert signs == [0, 0, 0, 1]

    def arrives(tensor, root, async_op):
        tensor.fill_(signs.pop(0))
        return Sent()

    monkeypatch.setattr(dist, "broadcast", arrives)
    Ranks(1, 2, CPU).wait_for_first()
    assert signs == []


def test_a_first_rank_without_a_sign_of_life_is_lost(monkeypatch):
    answers = iter([Sent(), Sent(), Sent("[gloo.cc:9] Timed out waiting 300000ms for recv operation. More")])
    monkeypatch.setattr(dist, "broadcast", lambda tensor, root, async_op: next(answers))
    with pytest.raises(LostProcess, match=r"^rank 1 lost a fellow process: Timed out waiting"):
        Ranks(1, 2, CPU).wait_for_first()


def test_a_first_rank_that_takes_the_connection_and_never_answers_is_lost():
    """As one that was stopped while the others join it."""
    with socket.socket() as stopped:
        stopped.bind(("127.0.0.1", 0))
        stopped.listen()
        world = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", "from pgolf.runtime.ranks import launch\nwith launch('cpu', 0.2): pass"],
            env={**os.environ, **world, "MASTER_PORT": str(stopped.getsockname()[1]), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "train_gpt.py: rank 1 lost a fellow process while joining it: no answer in 0.4 s\n"


def test_one_rank_alone_sends_nothing(monkeypatch):
    monkeypatch.setattr(dist, "broadcast", lambda *args, **kw: pytest.fail("was sent"))
    Ranks(0, 1, CPU).alive(done=True)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x: must be a whole number"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=99"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1"),
        ({"WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0"),
        ({"RANK": "7"}, "RANK=7 and WORLD_SIZE=1: ranks are 0 to"),
        ({"LOCAL_RANK": "\u0661"}, "LOCAL_RANK="),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, MASTER_ADDR, MASTER_PORT; torchrun sets them all"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "y"}, "MASTER_PORT=y"),
    ],
)
def test_places_that_no_launcher_names_are_one_line(environ, named, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named) as error, launch("cpu"):
        pass
    assert len(str(error.value)) < 300
