"""What torch.compile says of an operation that it does not know does not grow with the layers before it."""

import logging
import sys

import pytest
import torch
from torch import Tensor

from pgolf import ops
from pgolf.ops import backends, compiler_messages


@torch.library.custom_op("pgolf_test::last", mutates_args=())
def last(x: Tensor, y: list[Tensor], name: str, scale: float = 1.0) -> Tensor:
    return x + scale * y[0]


@last.register_fake
def _(x, y, name, scale=1.0):
    return torch.empty_like(x)


def message_letters(layers: int) -> int:
    """Of all that Inductor says of operations that it meets for the first time, with so many layers before the last."""
    torch.compiler.reset()
    from torch._inductor import config, graph, lowering

    for operation in list(lowering.lowerings):  # as in a fresh process
        if str(operation).startswith(("pgolf.", "pgolf_test.")):
            del lowering.lowerings[operation]
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    x, stream, weights = torch.randn(2, 4, 16), torch.randn(4, 16), torch.randn(2, 16)

    def forward(x, y):
        for _ in range(layers):
            x, y = ops.residual_rms_norm(x, y, [stream], weights)
        return last(x, [y], "layers", 0.5)

    level = graph.log.level
    graph.log.addHandler(handler)
    graph.log.setLevel(logging.INFO)
    try:
        with torch.no_grad(), config.patch(force_disable_caches=True):
            found = torch.compile(forward, fullgraph=True)(*x)
            torch.testing.assert_close(found, forward(*x))
    finally:
        graph.log.setLevel(level)
        graph.log.removeHandler(handler)
    mine = [text for text in texts if "pgolf_test.last" in text]
    assert len(mine) == 1, "Inductor no longer tells of it in this place"
    return len(mine[0])


def test_messages_do_not_grow_with_layers(monkeypatch):
    short = [message_letters(layers) for layers in (2, 6)]
    assert max(short) - min(short) < 20  # numbers in names
    assert max(short) < 400
    from torch._inductor import exc

    def long(target, args, kwargs):
        return "\n".join(f"{value}" for value in (target, *args))

    monkeypatch.setattr(compiler_messages, "shorten", lambda: None)
    monkeypatch.setattr(exc.OperatorIssue, "operator_str", staticmethod(long))
    assert message_letters(4) > 10 * max(short)  # Inductor's own way, or this test tests nothing


def test_an_argument_in_short():
    text = compiler_messages.operator_text("op", [torch.float32, [1, None], "x" * 1000], {"scale": 2})
    lines = text.splitlines()
    assert lines[:3] == ["  target: op", "  args[0]: torch.float32", "  args[1]: [1, None]"]
    assert len(lines[3]) < compiler_messages.LONGEST + 20
    assert lines[4] == "  kwargs: {scale: 2}"


def test_the_message_names_shape_and_dtype():
    pytest.importorskip("torch._inductor.ir")
    from torch._inductor import ir

    layout = ir.FixedLayout(torch.device("cpu"), torch.bfloat16, [2, 3])
    box = ir.TensorBox(ir.StorageBox(ir.InputBuffer(name="x", layout=layout)))
    # Of the second one nothing can be asked.
    text = compiler_messages.operator_text("op", [box, object.__new__(ir.IRNode)], {})
    assert text.splitlines()[1:] == ["  args[0]: TensorBox [2, 3] torch.bfloat16", "  args[1]: IRNode"]


def test_the_compiler_is_not_imported_for_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._inductor.exc", raising=False)
    assert backends.choose("newton_schulz", "cpu") == "reference"
    assert "torch._inductor.exc" not in sys.modules
