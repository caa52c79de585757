"""Wheels for a machine without a network, unpacked where Python finds them. A wheel is a zip: no installer is needed.

What is too large to travel whole may come as NAME.whl.xz, or in parts NAME.whl.00, NAME.whl.01, ...
"""

import io
import lzma
import re
import zipfile
from collections import defaultdict
from pathlib import Path

from bench.visit import facts


def unpack(folder: Path | None, site: Path) -> None:
    """Every wheel of `folder` into `site`; one that was unpacked there before is left. A bad one is a fact."""
    if folder is None:
        return
    pieces: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("*.whl*")):
        pieces[re.sub(r"\.whl(\.xz|\.\d+)*$", ".whl", path.name)].append(path)
    site.mkdir(parents=True, exist_ok=True)
    for name, paths in pieces.items():
        mark = site / f".{name}.unpacked"
        if mark.exists():
            continue
        try:
            data = b"".join(path.read_bytes() for path in paths)
            if data[:6] == b"\xfd7zXZ\x00":
                data = lzma.decompress(data)
            with zipfile.ZipFile(io.BytesIO(data)) as wheel:
                wheel.extractall(site)
        except (OSError, lzma.LZMAError, zipfile.BadZipFile) as error:
            facts.add("wheel", name=name, error=f"{type(error).__name__}: {error}")
        else:
            mark.touch()
            facts.add("wheel", name=name, bytes=len(data))
