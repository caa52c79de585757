"""Between two synchronisations of the ranks the host reads nothing of what the device computes.

What would is refused here, where a CPU would not notice.

Copies to the host that wait are for the GPU test of tests/training/test_train.py; on a CPU there are none.
"""

import contextlib
import threading

import pytest
import torch
from small_trainer import make_trainer, no_score
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pgolf.training.train_log import TrainLog

# Their results, or the shapes of them, are known to the host only when the device has got there.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "repeat_interleave", "_unique2", "unique_dim"}
READING = ("tolist", "numpy", "cpu", "__array__")  # methods of a tensor, which on a CPU call no operation
STEP = {
    "ITERATIONS": "6",
    "LOADER": "documents",
    "MICRO_BATCH_TOKENS": "64",
    "TRAIN_LOG_EVERY": "1",
    "GRAD_CLIP_NORM": "0.5",
    "MUON_BETA2": "0.9",
    "MUON_RENORMALIZE": "row",
    "MUON_LATE_LAYER": "1",
    "MUON_LATE_LR_MULT": "0.5",
    "MTP_TOKENS": "1",
    "QAT": "soft_round",
    "LATE_QAT_THRESHOLD": "0.8",
    "TRAIN_SEQ_SCHEDULE": "8@0.3",
    "NUM_LOOPS": "1",
    "LOOP_END": "0",
    "ENABLE_LOOPING_AT": "0.5",
}


class HostWaits(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU; `reading()` allows it for a while."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.allowed, self.operations = False, 0
        self.thread = threading.get_ident()
        for name in READING:
            monkeypatch.setattr(torch.Tensor, name, self._refusing(name, getattr(torch.Tensor, name)))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        name = function._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(getattr(x, "dtype", 0) == torch.bool for x in tree_leaves(args[1:2]))
        self._refuse("nonzero" if by_mask else name)
        return function(*args, **(kwargs or {}))

    def _refuse(self, name: str) -> None:
        if name in (*WAITING, *READING) and not self.allowed and threading.get_ident() == self.thread:
            raise HostWaits(name)

    def _refusing(self, name, method):
        def call(tensor, *args, **kwargs):
            self._refuse(name)
            return method(tensor, *args, **kwargs)

        return call

    @contextlib.contextmanager
    def reading(self):
        self.allowed = True
        try:
            yield
        finally:
            self.allowed = False


LOOKS = [
    float,
    bool,
    torch.Tensor.item,
    lambda x: x.tolist(),
    lambda x: x.numpy(),
    torch.Tensor.nonzero,
    lambda x: x[x > 0],
    lambda x: x.index_put_((x > 0,), torch.zeros(1)),
    lambda x: torch.equal(x, x),
]


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_is_noticed(look, monkeypatch):
    x = torch.ones(1)
    with monkeypatch.context() as patch, (mode := NoWaiting(patch)):
        with pytest.raises(HostWaits):
            look(x)
        with mode.reading():
            look(x)
        (x[torch.zeros(1, dtype=torch.int64)] + 1).sum()


@pytest.mark.parametrize("average", [{"EMA_DECAY": "0.9"}, {"EMA_DECAY": "0", "SWA_EVERY": "1", "SWA_START_FRAC": "1"}])
def test_a_step_reads_nothing_of_the_device(average, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **STEP, **average)
    monkeypatch.setattr(trainer, "save", lambda: None)  # it copies to the host
    monkeypatch.setattr(trainer, "finite", lambda: True)  # looked at once, at the end
    loss = trainer.loss

    def as_compiled(*batch):
        """On a CPU some operations look at values where that is free; what the compiler traces does not."""
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            return loss(*batch)

    trainer.loss = as_compiled
    trainer.warm_up()
    write = TrainLog.write
    with monkeypatch.context() as patch, (mode := NoWaiting(patch)):

        def written(log, *record):
            with mode.reading():  # by now the number is in the host's memory
                write(log, *record)

        patch.setattr(TrainLog, "write", written)
        trainer.train(no_score)
    assert trainer.step == 6
    assert mode.operations > 1000
    assert sum("train_loss:" in line for line in trainer.run.lines) == 6
