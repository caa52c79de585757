"""What Inductor makes of a training step for a Hopper GPU, on a machine that has none.

`compiled_kernels` gives every kernel of the forward and the backward pass of `Model.loss` at full size:

1. torch.compile traces the loss with fake tensors (shapes without data) on the CPU; AOTAutograd cuts the joint graph in
   two by its own rule for what is saved. Inductor's passes run; its code generator does not.
2. Both graphs are moved to a fake `cuda:0`, lowered, and given to Inductor's scheduler for CUDA with the properties of
   an H100. Its decisions (fusions, split reductions, what is materialised) are read before any code is generated.

Attention is one opaque operation forward and one backward, as FlashAttention is, and operations of pgolf take their
Triton backend; which of them stand between the products is the model's `Execution.fused`. Not as on a GPU:
the trace is made where `F.rms_norm` is composed of elementary operations, and nothing is autotuned, so the choice
between a library's product and a template is never made (the library's is counted).

Bytes of a generated kernel: for each buffer that it reads from or leaves in memory the elements that its index
expressions touch, each once, and never more than the buffer has. What stays inside the kernel counts nothing. That is
`get_read_write_buffers_sizes` of the scheduler's node, but for slices, which that counts as whole buffers. Bytes of an
operation that Inductor calls: all its tensor arguments and results, each once, and an argument that it changes twice.
"""

import contextlib
import functools
import gc
import math
import re
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import pgolf.model.attention
from pgolf.model import Execution, Model, ModelConfig
from pgolf.ops import backends

CUDA = torch.device("cuda", 0)
H100 = {
    "multi_processor_count": 132,
    "major": 9,
    "minor": 0,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
}
# Of a kernel that does nothing but sum: additions, and what only moves or pads what is added.
_SUMMING = {"add", "reshape", "view", "_unsafe_view", "unsqueeze", "squeeze", "expand", "permute", "full", "slice"}
_SUMMING |= {"slice_scatter", "slice_backward", "constant_pad_nd", "convert_element_type", "select", "unbind"}
_FRAME = re.compile(r'File ".*?/(\w+\.py)", line \d+, in (\S+)')


@dataclass(frozen=True)
class Kernel:
    """One launch. A call of a library or of one of our operations has `operation`, a generated kernel ""."""

    operation: str  # "mm", "pgolf.leaky_relu2_mlp", ...
    backward: bool
    bytes_read: int
    bytes_written: int
    shapes: tuple[tuple[int, ...], ...]  # of a call's tensor arguments
    sources: frozenset[tuple[str, ...]]  # of each operation in it, the functions of the model it comes from, outermost
    # first, as "file.py:function"
    scheduler_bytes: int = 0  # of a generated kernel by Inductor's own count, which takes a slice for the whole buffer
    only_sums: bool = False  # a generated kernel
    reads_of: tuple[str, ...] = ()  # a generated kernel's inputs: who made each; "" another such kernel or the graph's

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written


class Graph(NamedTuple):
    """What Inductor is given of a compilation."""

    module: torch.fx.GraphModule
    inputs: list
    backward: bool
    inference: bool = False


def compiled_kernels(
    config: ModelConfig, looping: bool, tokens: int, length: int, packed: bool, fused: frozenset[str] = frozenset()
) -> list[Kernel]:
    """Every kernel of forward and backward of `Model.loss` in bfloat16 on `tokens` tokens in rows of `length`.

    `packed`: one row with borders every `length` tokens, as a loader of documents gives it. `fused`: the execution's.
    """
    kernels = []
    with without_garbage_collection():
        for graph in trace(config, looping, tokens, length, packed, fused):
            with scheduled(graph) as lowering:
                found = (_kernel(node, lowering, graph.backward) for node in lowering.scheduler.nodes)
                kernels += list(filter(None, found))
    return kernels


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """A sixth of the time of a trace; it needs 0.7 GB either way."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@torch.library.custom_op("pgolf_bench::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("only its shapes are known")


@_attention.register_fake
def _(q, k, v, cu_seqlens, length):
    return q.new_empty(q.shape), q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)


@torch.library.custom_op("pgolf_bench::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_seqlens: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("only its shapes are known")


@_attention_backward.register_fake
def _(grad, q, k, v, y, lse, cu_seqlens, length):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, ctx.length = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _differentiate(ctx, grad, _):
    return *_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.length), None, None


_attention.register_autograd(_differentiate, setup_context=_keep)


def trace(
    config: ModelConfig, looping: bool, tokens: int, length: int, packed: bool, fused: frozenset[str]
) -> list[Graph]:
    """The graphs of the forward and the backward pass that Inductor would lower; as `compiled_kernels` otherwise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows = 1 if packed else tokens // length
    with FakeTensorMode(), _as_on_cuda(), graphs_of_compilations() as graphs:
        model = Model(config, Execution(torch.bfloat16, "flash3", fused))
        model.enter(looping=looping)
        batch = torch.zeros(rows, tokens // rows, dtype=torch.int64)
        borders = (torch.zeros(tokens // length + 1, dtype=torch.int32), length) if packed else (None, 0)
        torch.compile(model.loss, fullgraph=True, dynamic=False)(batch, batch, "mean", *borders)
    return graphs


@contextlib.contextmanager
def graphs_of_compilations() -> Iterator[list[Graph]]:
    """While the block runs, torch.compile gives functions that return what is computed in vain, and the list fills."""
    from torch._inductor.compile_fx import compile_fx

    graphs: list[Graph] = []

    def keep(graph: torch.fx.GraphModule, inputs: list, is_backward: bool = False, **more: Any) -> Callable:
        graphs.append(Graph(graph, inputs, is_backward, more.get("is_inference", False)))
        (results,) = graph.graph.output_node().args
        made = [value.meta["val"] if isinstance(value, torch.fx.Node) else None for value in results]

        def run(_: list) -> list:
            return made

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    compiled = functools.partial(torch.compile, backend=functools.partial(compile_fx, inner_compile=keep))
    with (
        mock.patch.object(torch, "compile", compiled),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        torch.compiler.reset()
        try:
            yield graphs
        finally:
            torch.compiler.reset()


@contextlib.contextmanager
def _as_on_cuda() -> Iterator[None]:
    """FlashAttention and our Triton kernels are taken though no GPU is there."""
    with (
        mock.patch.dict(pgolf.model.attention.LOADED, flash3=lambda *arguments: _attention(*arguments)[0]),
        mock.patch.object(backends, "_triton", return_value=backends.Availability(True)),
        backends.backend("triton"),
    ):
        yield


@contextlib.contextmanager
def scheduled(graph: Graph) -> Iterator[Any]:
    """Inductor's lowering of a graph for CUDA, with its scheduler's nodes; while the block runs it may go on."""
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = graph.module
    for node in module.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": CUDA}
    with _an_h100():
        with FakeTensorMode():
            inputs = [_moved(x) if isinstance(x, Tensor) else x for x in graph.inputs]
        compile_fx.view_to_reshape(module)
        with torch.no_grad():
            mode = compile_fx.fake_tensor_prop(module, inputs, True)
        compile_fx._recursive_record_original_output_strides(module)
        with V.set_fake_mode(mode):
            compile_fx._recursive_post_grad_passes(module, is_inference=graph.inference)
            lowering = GraphLowering(
                module,
                inputs,
                shape_env=compile_fx.shape_env_from_inputs(inputs),
                is_backward=graph.backward,
                is_inference=graph.inference,
            )
            with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]), V.set_debug_handler(DebugContext()):
                lowering.run(*inputs)
                lowering.init_wrapper_code()
                lowering._update_scheduler()
                yield lowering


def _moved(x: Tensor) -> Tensor:
    """To the GPU, but for numbers of the host: a learning rate."""
    device = x.device if x.dtype == torch.float64 and x.ndim == 0 else CUDA
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


@contextlib.contextmanager
def _an_h100() -> Iterator[None]:
    """Inductor asks for the device's properties, and for Triton, in these places."""
    from torch._inductor import scheduler
    from torch._inductor.runtime.hints import DeviceProperties

    properties = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, **H100)
    hints = DeviceProperties("cuda", 0, cc=90, **{name: value for name, value in H100.items() if name != "minor"})
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(DeviceProperties, "create", return_value=hints),
        mock.patch.object(scheduler, "has_triton", return_value=True),
        # These two ask for a device guard, which a build without CUDA does not have.
        mock.patch.object(Tensor, "__invert__", lambda x: x.bitwise_not()),
        mock.patch.object(Tensor, "copy_", lambda x, source: torch.ops.aten.copy_.default(x, source)),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _kernel(node: Any, lowering: Any, backward: bool) -> Kernel | None:
    """None for what launches nothing."""
    from torch._inductor import ir
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    parts = list(node.get_nodes())
    if isinstance(node, NopKernelSchedulerNode) or isinstance(parts[0].node, ir.MultiOutput):
        return None
    sources = frozenset(frames_of(origin) for part in parts if part.node is not None for origin in part.node.origins)
    if isinstance(node, ExternKernelSchedulerNode):
        return _call(node.node, node, sources, backward)
    read, written = _touched(parts, lowering)
    return Kernel(
        "",
        backward,
        sum(read.values()),
        sum(written.values()),
        (),
        sources,
        node.get_read_write_buffers_sizes(),
        {_computes(origin) for part in parts if part.node is not None for origin in part.node.origins} <= _SUMMING,
        tuple(_maker(name, lowering) for name in read),
    )


def _computes(origin: torch.fx.Node) -> str:
    """ "add" of aten.add.Tensor; what another operation computed is not this kernel's work."""
    namespace, name, *_ = f"{origin.target}.".split(".")
    return name if namespace in ("aten", "prims") else "view"


def _maker(name: str, lowering: Any) -> str:
    """The operation, called as in `Kernel.operation`, that made a buffer."""
    from torch._inductor import ir

    made = lowering.scheduler.name_to_buf.get(lowering.scheduler.mutation_real_name.get(name, name))
    node = made.defining_op.node if made is not None else None
    if isinstance(node, ir.MultiOutput):
        node = node.inputs[0]
    return _operation(node) if isinstance(node, ir.ExternKernel) else ""


def _touched(parts: list, lowering: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes read and written in memory by the nodes of one kernel, by buffer."""
    from torch._inductor.dependencies import MemoryDep, WeakDep

    made = {name for part in parts for name in part.get_buffer_names()}
    used: tuple[dict[str, set], dict[str, set]] = ({}, {})
    for part in parts:
        for kind, deps in zip(used, (part.read_writes.reads, part.read_writes.writes), strict=True):
            for dep in deps:
                if not isinstance(dep, WeakDep):
                    kind.setdefault(dep.name, set()).add(dep)
    read = {name: deps for name, deps in used[0].items() if name not in made}
    written = {name: deps for name, deps in used[1].items() if _leaves(name, parts, lowering)}

    def size(name: str, deps: set) -> int:
        whole, item = _buffer(name, lowering)
        elements = sum(_elements(dep) if isinstance(dep, MemoryDep) else whole for dep in deps)
        return min(elements, whole) * item

    return {n: size(n, deps) for n, deps in read.items()}, {n: size(n, deps) for n, deps in written.items()}


def _elements(dep: Any) -> int:
    sizes = dict(zip(dep.var_names, dep.size, strict=True))
    return math.prod(int(size) for name, size in sizes.items() if name in dep.index.free_symbols or _indirect(dep))


def _indirect(dep: Any) -> bool:
    return bool(dep.index.free_symbols - set(dep.var_names))


def _leaves(name: str, parts: list, lowering: Any) -> bool:
    """Whether a result is used outside the kernel."""
    names = {part.get_name() for part in parts}
    return any(user.get_name() not in names for user in lowering.scheduler.name_to_buf[name].users)


def _buffer(name: str, lowering: Any) -> tuple[int, int]:
    """(elements, bytes an element)."""
    buffer = lowering.try_get_buffer(lowering.scheduler.mutation_real_name.get(name, name))
    return math.prod(int(size) for size in buffer.get_size()), buffer.get_dtype().itemsize


def _call(node: Any, scheduled: Any, sources: frozenset, backward: bool) -> Kernel:
    """A call of a library or of a registered operation: arguments in, results out."""
    arguments = [x for x in node.inputs if hasattr(x, "get_size")]
    results = [user.node.node for out in scheduled.get_outputs() for user in out.users if _is_result(user)]
    results = results or [node]
    changed = set(node.get_mutation_names())
    return Kernel(
        _operation(node),
        backward,
        sum(_bytes(x) for x in _distinct(arguments)),
        sum(_bytes(x) for x in (*results, *(x for x in arguments if x.get_name() in changed))),
        tuple(tuple(int(size) for size in x.get_size()) for x in arguments),
        sources,
    )


def _operation(node: Any) -> str:
    name = getattr(node, "op_overload", None)
    return str(name).removesuffix(".default") if name is not None else (node.python_kernel_name or "").split(".")[-1]


def _is_result(user: Any) -> bool:
    from torch._inductor import ir

    return isinstance(getattr(user.node, "node", None), ir.MultiOutput)


def _distinct(arguments: list) -> list:
    """Without repetitions: the first layer mixes x0 with itself."""
    return list({(x.get_name(), str(x.get_layout())): x for x in arguments}.values())


def _bytes(x: Any) -> int:
    return math.prod(int(size) for size in x.get_size()) * x.get_dtype().itemsize


def frames_of(origin: torch.fx.Node) -> tuple[str, ...]:
    trace = origin.meta.get("stack_trace") or ""
    return tuple(":".join(found) for line in trace.splitlines() if "pgolf" in line and (found := _first(line)))


def _first(line: str) -> tuple[str, ...]:
    found = _FRAME.search(line)
    return found.groups() if found else ()
