"""The training loop around captured passes, whose results lie in memory that the next pass takes again."""

import functools

import pytest
import torch
from small_trainer import CPU, make_trainer, no_score, weights

from pgolf.errors import UserError
from pgolf.training import cuda_graphs
from pgolf.training.cuda_graphs import choose_cuda_graphs

GPU = torch.device("cuda", 0)
EVERYTHING = {
    "ITERATIONS": "5",
    "MICRO_BATCH_TOKENS": "48",  # three passes, the last a shorter one
    "TRAIN_LOG_EVERY": "1",
    "GRAD_CLIP_NORM": "0.5",
    "MUON_BETA2": "0.9",
    "QAT": "soft_round",
    "MTP_TOKENS": "1",
    "NUM_LOOPS": "1",
    "LOOP_END": "0",
    "ENABLE_LOOPING_AT": "0.4",
}


class Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph, *parameters):
        ctx.graph = graph
        return graph.loss.detach()

    @staticmethod
    def backward(ctx, factor):
        graph = ctx.graph
        with torch.enable_grad():
            computed = torch.autograd.grad(graph.eager, graph.trainer.parameters, factor)
        torch._foreach_copy_(graph.gradients, computed)
        return None, *(memory.detach() for memory in graph.gradients)


class Graph:
    """Stands in for the compiled loss: results always at the same addresses, and gone when the next pass begins."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.loss = torch.zeros(())
        self.gradients = [torch.zeros_like(p) for p in trainer.parameters]
        self.passes = 0

    def __call__(self, *batch):
        self.passes += 1
        for memory in (self.loss, *self.gradients):
            memory.fill_(torch.nan)
        self.eager = self.trainer.training_loss(*batch)
        self.loss.copy_(self.eager.detach())
        return Replayed.apply(self, *self.trainer.parameters)

    def holds(self, tensor: torch.Tensor) -> bool:
        mine = {memory.untyped_storage().data_ptr() for memory in (self.loss, *self.gradients)}
        return tensor.untyped_storage().data_ptr() in mine


def replaying(folder, **environ):
    trainer = make_trainer(folder, **{**EVERYTHING, **environ})
    trainer.loss = Graph(trainer)
    trainer.cuda_graphs = True
    return trainer


def losses(trainer) -> list[str]:
    return [line.split()[1] for line in trainer.run.lines if "train_loss:" in line]


@pytest.mark.parametrize("average", [{"EMA_DECAY": "0.9"}, {"EMA_DECAY": "0", "SWA_EVERY": "1", "SWA_START_FRAC": "1"}])
def test_nothing_of_one_pass_is_needed_after_the_next(average, tmp_path, monkeypatch):
    plain = make_trainer(tmp_path, **EVERYTHING, **average)
    plain.train(no_score)
    trainer = replaying(tmp_path, **average)
    marks = []
    monkeypatch.setattr(cuda_graphs, "begin", functools.partial(marks.append, 1))
    trainer.train(no_score)
    assert torch.equal(weights(trainer), weights(plain))
    assert losses(trainer) == losses(plain)
    assert len(losses(plain)) == 5
    assert trainer.loss.passes == len(marks) == 15


def test_after_a_step_nothing_refers_to_the_graphs_memory(tmp_path):
    trainer = replaying(tmp_path)
    loss = trainer.take_step(1.0)
    assert not trainer.loss.holds(loss)
    assert all(p.grad is None for p in trainer.parameters)
    states = [value for state in trainer.optimisers.adam.state.values() for value in state.values()]
    assert states
    assert not any(map(trainer.loss.holds, states))


def test_the_stand_in_tells_when_gradients_are_not_kept(tmp_path, monkeypatch):
    trainer = replaying(tmp_path)
    (loss := trainer.loss(*next(trainer.micro_batches()))).backward()
    assert trainer.loss.holds(loss)
    assert all(trainer.loss.holds(p.grad) for p in trainer.parameters)  # autograd takes over what backward returns
    found = []
    for keep in (cuda_graphs.keep_gradients, lambda parameters: None):
        trainer = replaying(tmp_path)
        monkeypatch.setattr(cuda_graphs, "keep_gradients", keep)
        trainer.take_step(1.0)
        found.append(weights(trainer))
    assert float((found[0] - found[1]).abs().max()) > 1e-4


def test_warm_up_goes_on_until_a_pass_is_replayed(tmp_path):
    trainer = replaying(tmp_path, WARMUP_STEPS="1", MICRO_BATCH_TOKENS="128")
    before = weights(trainer)
    trainer.warm_up()
    assert trainer.loss.passes == 2 * 3  # two phases
    assert torch.equal(weights(trainer), before)


def test_passes_that_are_not_captured_are_told(tmp_path, monkeypatch):
    trainer = replaying(tmp_path)
    counts = iter([3, 5])
    monkeypatch.setattr(cuda_graphs, "skipped", lambda: next(counts))
    trainer.warm_up()
    assert trainer.run.lines[-1].startswith("cuda_graphs: 2 passes are not captured")


def test_the_compilers_own_names():
    from torch._inductor import cudagraph_trees, cudagraph_utils

    torch.compile(lambda x: x, options={"triton.cudagraphs": True})  # an unknown option is refused
    before = cuda_graphs.skipped()
    cudagraph_utils.log_cudagraph_skip_and_bump_counter("a test")
    assert cuda_graphs.skipped() == before + 1
    generation = cudagraph_trees.CUDAGraphTreeManager.get_curr_generation()
    cuda_graphs.begin()
    assert cudagraph_trees.CUDAGraphTreeManager.get_curr_generation() != generation


def test_where_graphs_are_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_cuda_graphs("on", GPU, compiled=True)
    for setting in ("auto", "off"):
        assert not choose_cuda_graphs(setting, GPU, compiled=True)
    monkeypatch.setattr(cuda_graphs, "WINS", frozenset({(9, 0)}))
    assert choose_cuda_graphs("auto", GPU, compiled=True)
    assert not choose_cuda_graphs("auto", GPU, compiled=False)
    assert not choose_cuda_graphs("auto", CPU, compiled=True)
    with pytest.raises(UserError, match=r"^CUDA_GRAPHS=on: .* COMPILE=off; accepted: auto, off$"):
        choose_cuda_graphs("on", GPU, compiled=False)


def test_a_cpu_is_refused_in_a_line(tmp_path):
    with pytest.raises(
        UserError, match=r"^CUDA_GRAPHS=on: needs a CUDA device, this is cpu; accepted here: auto, off$"
    ):
        make_trainer(tmp_path, CUDA_GRAPHS="on", COMPILE="on")
    assert make_trainer(tmp_path).cuda_graphs is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_with_graphs_is_training_without(tmp_path):
    found = []
    for graphs in ("off", "on"):
        environ = {**EVERYTHING, "MICRO_BATCH_TOKENS": "64", "MODEL_DIM": "64", "CUDA_GRAPHS": graphs}
        trainer = make_trainer(tmp_path, torch.device("cuda", torch.cuda.current_device()), **environ)
        assert trainer.cuda_graphs == (graphs == "on")
        trainer.warm_up()
        trainer.train(no_score)
        assert not any("not captured" in line for line in trainer.run.lines)
        values = [float(value.removeprefix("train_loss:")) for value in losses(trainer)]
        found.append((torch.tensor(values), weights(trainer).cpu()))
    (plain, plain_weights), (replayed, replayed_weights) = found
    assert len(plain) == 5
    torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(replayed_weights, plain_weights, rtol=1e-3, atol=1e-3)
