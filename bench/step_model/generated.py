"""The Triton kernels that Inductor writes for a training step: their source, without a GPU.

`step_sources` gives those of forward and backward of `Model.loss`, lowered as compiled_step.py does it and then handed
on to Inductor's code generator; `optimiser_sources` those of Muon's compiled parts. AdamW, the limit of the gradients'
norm and averages of the weights are torch's own kernels, of which none is generated.
"""

import ast
import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import torch

from bench.step_model.compiled_step import (
    Graph,
    frames_of,
    graphs_of_compilations,
    scheduled,
    trace,
    without_garbage_collection,
)
from pgolf.model import ModelConfig
from pgolf.settings import Settings


@dataclass(frozen=True)
class Source:
    """One generated kernel of one graph."""

    ANONYMOUS: ClassVar[str] = "triton_kernel"

    name: str  # "triton_red_fused_mul_3"
    text: str  # a module that has it
    part: str  # of the step: "forward", "backward", "optimiser"
    launches: int
    functions: frozenset[str]  # of the model, innermost first of what it computes: "file.py:function"

    @property
    def anonymous(self) -> str:
        """The text with another name, which kernels share that differ in their names only."""
        return self.text.replace(self.name, self.ANONYMOUS)


def step_sources(
    config: ModelConfig, looping: bool, tokens: int, length: int, packed: bool, fused: frozenset[str] = frozenset()
) -> list[Source]:
    """Of forward and backward; arguments as of `compiled_step.compiled_kernels`."""
    with without_garbage_collection():
        graphs = trace(config, looping, tokens, length, packed, fused)
        return [source for graph in graphs for source in _sources(graph, "backward" if graph.backward else "forward")]


def optimiser_sources(config: ModelConfig, settings: Settings) -> list[Source]:
    """Of Muon where one process has all matrices. With more, each has fewer, and the kernels differ in that number."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pgolf.training.muon import Muon
    from pgolf.training.optim import OptimiserConfig

    options = OptimiserConfig.of(settings)
    shapes = [shape for name, shape in config.shapes().items() if name.endswith("_bank")]
    with FakeTensorMode(), graphs_of_compilations() as graphs:
        banks = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for bank in banks:
            bank.grad = torch.zeros_like(bank)
        muon = Muon(
            banks,
            options.matrix_lr,
            row_normalize=options.muon_row_normalize,
            weight_decay=options.muon_weight_decay,
            beta2=options.muon_beta2,
            renormalize=options.muon_renormalize,
            compiled=True,
        )
        muon.step()
    return [source for graph in graphs for source in _sources(graph, "optimiser")]


def _sources(graph: Graph, part: str) -> list[Source]:
    with scheduled(graph) as lowering, _watched() as computed:
        wrapper = lowering.wrapper_code
        wrapper.push_codegened_graph(lowering)
        lowering.scheduler.codegen()
        code, *_ = wrapper.generate(lowering.is_inference)
        text = getattr(code, "value", code)
    launches = Counter(name for name, _ in computed)
    return [
        Source(
            name,
            source,
            part,
            launches[name],
            frozenset(function for found, functions in computed if found == name for function in functions),
        )
        for name, source in _kernels(text)
    ]


def _kernels(module: str) -> Iterator[tuple[str, str]]:
    """(name, source) of each `name = async_compile.triton("name", source)`."""
    for node in ast.walk(ast.parse(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "triton":
            yield ast.literal_eval(node.args[0]), ast.literal_eval(node.args[1])


@contextlib.contextmanager
def _watched() -> Iterator[list[tuple[str, set[str]]]]:
    """(name, functions of the model) of each kernel that the block launches."""
    from torch._inductor import async_compile
    from torch._inductor.codegen.triton import TritonScheduling

    define = TritonScheduling.define_kernel
    found: list[tuple[str, set[str]]] = []

    def watching(self, source, nodes, kernel):
        name = define(self, source, nodes, kernel)
        parts = [part for node in nodes if hasattr(node, "get_nodes") for part in node.get_nodes()]
        origins = {origin for part in parts if part.node is not None for origin in part.node.origins}
        found.append((name, {frames[-1] for frames in map(frames_of, origins) if frames}))
        return name

    with (
        mock.patch.object(TritonScheduling, "define_kernel", watching),
        # Asks Triton's driver; only a key of caches is made of it.
        mock.patch.object(torch.utils._triton, "triton_hash_with_backend", return_value="none"),
        mock.patch.object(async_compile.AsyncCompile, "use_process_pool", classmethod(lambda cls: False)),
    ):
        yield found
