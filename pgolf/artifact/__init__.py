"""The artifact: a model's tensors in one file, and the code that counts beside them.

coder              entropy coding of quantized weights and small floats
compressors        what other compressors make of an artifact
corrections        low-rank corrections as a file holds them
file               reading and writing
import_checkpoint  the weights of the entries' scripts as an artifact
manifest           what a file says it holds
minify             Python without what it does not need to run
model              from a file back to a model that computes
packed_code        the code that a run needs, as one archive
stored_tensor      a tensor as a file holds it
streams            several arrays as one blob
"""

from pgolf.artifact.file import VERSION, Artifact, ByteCount, read_artifact, write_artifact
from pgolf.artifact.stored_tensor import StoredTensor

__all__ = ["VERSION", "Artifact", "ByteCount", "StoredTensor", "read_artifact", "write_artifact"]
