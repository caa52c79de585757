"""pgolf: kernels and a training script for tiny language models under a byte budget.

`from pgolf import ops` gives the operations; the `pgolf` command checks a machine, prepares data, prices a model
in bytes and scores a run.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pgolf.errors import ArtifactError, DataError, PgolfError, UserError
from pgolf.runtime.checkout import complete

if TYPE_CHECKING:
    from pgolf import ops
    from pgolf.evaluation.ngram_cache import NgramCache

complete()

__version__ = "0.1.0"
__all__ = ["ArtifactError", "DataError", "NgramCache", "PgolfError", "UserError", "__version__", "ops"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: `pgolf doctor` must run where torch does not.
    if name == "ops":
        return importlib.import_module("pgolf.ops")
    if name == "NgramCache":
        return importlib.import_module("pgolf.evaluation.ngram_cache").NgramCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
