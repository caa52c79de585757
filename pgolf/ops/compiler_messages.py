"""Short messages of torch.compile about the operations that it does not know, as ours are.

Inductor describes such an operation by everything that its arguments are computed from, once for each path from there
to here: a residual stream is read twice a layer, so the text grows exponentially with the layers. Up to torch 2.11 it
makes the text whenever it meets an operation for the first time, though nobody reads it: four layers of a record's
fused step were 122 MB and 40 s, eleven did not end. Later versions do so for an error and under TORCH_LOGS=inductor.
Here an argument is its type, shape and dtype.
"""

import contextlib
import sys
import textwrap
from typing import Any

from pgolf.errors import one_line

LONGEST = 200  # letters of an argument that is no tensor


def shorten() -> None:
    """For this process, once Inductor is imported; before, nothing happens, and nothing is imported.

    Called where code is traced: the compiler is imported by then, and has lowered nothing yet.
    """
    issue = getattr(sys.modules.get("torch._inductor.exc"), "OperatorIssue", None)
    if issue is not None and issue.operator_str is not operator_text:
        issue.operator_str = staticmethod(operator_text)


def operator_text(target: Any, args: Any, kwargs: dict[str, Any]) -> str:
    """What Inductor's own function of this purpose gives, with arguments in short."""
    lines = [f"target: {target}", *(f"args[{i}]: {_brief(value)}" for i, value in enumerate(args))]
    if kwargs:
        lines.append(f"kwargs: {_brief(kwargs)}")
    return textwrap.indent("\n".join(lines), "  ")


def _brief(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_brief, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_brief(inner)}' for name, inner in value.items())}}}"
    if not type(value).__module__.startswith("torch._inductor"):
        return one_line(str(value), LONGEST)
    words = [type(value).__name__]
    for name in ("get_size", "get_dtype"):
        with contextlib.suppress(AttributeError, NotImplementedError):  # what is no tensor
            words.append(str(getattr(value, name)()))
    return " ".join(words)
