"""pgolf: kernels and a training script for tiny language models under a byte budget.

`from pgolf import ops` gives the operations; the `pgolf` command checks a machine, prepares data, prices a model
in bytes and scores a run.
"""

from pgolf import ops
from pgolf.errors import ArtifactError, DataError, PgolfError, UserError

__version__ = "0.1.0"
__all__ = ["ArtifactError", "DataError", "PgolfError", "UserError", "__version__", "ops"]
