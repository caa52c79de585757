"""Files of torch.save that anybody may have made, read as data: nothing in them is run."""

import os
import pickle
import warnings
import zipfile
from typing import Any

import torch

from pgolf.runtime.files import file_bytes


def load_plain(path: str | os.PathLike[str]) -> Any:
    """Tensors, on the CPU, and plain values, as torch.save wrote them. A ValueError says in a few words what is wrong.

    What the container declares is summed before anything is allocated, so that memory stays within the file's size.
    torch's own words are kept back: they advise to run what the file holds.
    """
    try:
        size = file_bytes(path)
        if not size:
            raise ValueError("it is empty")
        with zipfile.ZipFile(path) as container:
            entries = container.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("it declares more bytes than it has")
    except OSError as error:
        raise ValueError(error.strerror or "input/output error") from None
    except ValueError:
        raise
    except Exception:  # whatever a damaged container makes zipfile raise
        raise ValueError("no file of torch.save, or damaged or cut short") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about its own kinds of tensors
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("it holds more than tensors and plain values, or is damaged; nothing of it was run") from None
    except Exception:  # whatever a damaged file makes torch raise
        raise ValueError("damaged or cut short") from None
