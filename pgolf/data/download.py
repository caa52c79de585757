"""FineWeb shards as the community publishes them on Hugging Face.

A repository's `<prefix>/manifest.json` lists its datasets (name, number of shards, tokenizer) and tokenizers (path).
Files land in the community's layout, `<root>/datasets/<dataset>/fineweb_train_000000.bin` and
`<root>/tokenizers/*.model`, each under its name only when its size and header are right; those that are there already
are kept. MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name another repository and folder, as in the
challenge's own downloader.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from reprlib import repr as shortened
from typing import Any, Protocol

from pgolf.data.prepare import DataPaths, locked
from pgolf.data.shards import read_token_count
from pgolf.data.tokenizer import Tokenizer
from pgolf.errors import DataError, UserError
from pgolf.presets import DEFAULT_TRAIN_SHARDS
from pgolf.runtime.files import JSON_BYTES, file_bytes, make_folder, making_folder, read_json, write_json
from pgolf.runtime.progress import progress

DEFAULT_PREFIX = "datasets"
CONNECT_SECONDS = 10  # for a connection to come about
MOST_FILES = 10_000  # of a split
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")


@dataclass(frozen=True)
class Variant:
    repo_id: str
    dataset: str


VARIANTS = {
    "sp1024": Variant("willdepueoai/parameter-golf", "fineweb10B_sp1024"),
    "sp4096": Variant("kevclark/parameter-golf", "fineweb10B_sp4096"),
    "sp8192": Variant("kevclark/parameter-golf", "fineweb10B_sp8192"),
    "caseops": Variant("romeerp/parameter-golf-caseops-v1", "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"),
}


class Hub(Protocol):
    """One repository of files. Both methods raise `DataError`, in one line, for whatever goes wrong."""

    repo_id: str

    def sizes(self, paths: list[str]) -> dict[str, int]:
        """Bytes of each file; files that do not exist are left out."""

    def fetch(self, path: str, folder: Path) -> Path:
        """Bring one file to somewhere in `folder`; going on where an earlier attempt in the folder stopped."""


class HuggingFaceHub:
    """A dataset repository, through `huggingface_hub`, which retries and resumes a transfer that breaks off."""

    def __init__(self, repo_id: str, endpoint: str | None = None):
        try:
            import huggingface_hub
            from huggingface_hub.utils import disable_progress_bars, logging
        except ImportError:
            raise UserError("downloading needs huggingface_hub; install it with: pip install 'pgolf[data]'") from None
        disable_progress_bars()  # one bar over all files is ours
        logging.set_verbosity_error()  # and one line for what goes wrong in the end
        self.repo_id = repo_id
        self._endpoint = endpoint
        self._hub = huggingface_hub

    def check_connection(self) -> None:
        """`DataError` when nothing answers at the hub's address. The library itself would try six times, in 25 s.

        A link that is only slow passes: what counts is that a connection comes about.
        """
        constants = self._hub.constants
        timeout = max(CONNECT_SECONDS, constants.HF_HUB_ETAG_TIMEOUT)
        try:
            self._hub.utils.get_session().head(self._endpoint or constants.ENDPOINT, timeout=timeout)
        except Exception as error:
            if _is_no_connection(error):
                raise self._explained(error, "the list of files") from None

    def sizes(self, paths: list[str]) -> dict[str, int]:
        self.check_connection()
        try:
            entries = self._hub.HfApi(endpoint=self._endpoint).get_paths_info(self.repo_id, paths, repo_type="dataset")
        except Exception as error:
            raise self._explained(error, "the list of files") from None
        return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}

    def fetch(self, path: str, folder: Path) -> Path:
        try:
            found = self._hub.hf_hub_download(
                self.repo_id, path, repo_type="dataset", local_dir=folder, endpoint=self._endpoint
            )
        except Exception as error:
            raise self._explained(error, path) from None
        return Path(found)

    def _explained(self, error: Exception, wanted: str) -> DataError:
        """One line for any failure: the library's own exceptions differ between its versions."""
        where = f"cannot fetch {wanted} from Hugging Face dataset {self.repo_id}"
        names = {kind.__name__ for kind in type(error).__mro__}
        if "RepositoryNotFoundError" in names:
            return DataError(f"{where}: no such dataset, or it needs a login")
        if "EntryNotFoundError" in names and "LocalEntryNotFoundError" not in names:
            return DataError(f"{where}: no such file there")
        if "OfflineModeIsEnabled" in names:
            return DataError(f"{where}: HF_HUB_OFFLINE is set; unset it to fetch anything")
        if "LocalEntryNotFoundError" in names or _is_no_connection(error):
            return DataError(f"{where}: no connection; check the network and run the same command again to go on")
        reason = str(error).strip().splitlines() or [""]
        return DataError(f"{where}: {type(error).__name__}: {reason[0]}; run the same command again to go on")


def _is_no_connection(error: Exception) -> bool:
    """By name, for the library changes between its versions what it sends requests with."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"})


def download(
    variant: str = "sp1024",
    root: str | os.PathLike[str] = "data",
    train_shards: int = DEFAULT_TRAIN_SHARDS,
    hub: Hub | None = None,  # default: Hugging Face
) -> DataPaths:
    """Fetch the whole validation split, the first `train_shards` training shards and the tokenizer of `variant`.

    After an error the same call goes on where it stopped.

    Raises:
        UserError: an unknown variant, more shards than there are, or too little disk space.
        DataError: a file cannot be had or is not what the repository says.
    """
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}; accepted are {', '.join(VARIANTS)}")
    if train_shards < 0:
        raise UserError(f"{train_shards} training shards; accepted are 0 and more")
    dataset = VARIANTS[variant].dataset
    if hub is None:
        hub = HuggingFaceHub(os.environ.get("MATCHED_FINEWEB_REPO_ID") or VARIANTS[variant].repo_id)
    prefix = PurePosixPath(os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", DEFAULT_PREFIX))
    root, folder = Path(root), Path(root) / "datasets" / dataset
    names, tokenizer_path = _wanted(_manifest(hub, str(prefix / "manifest.json")), dataset, train_shards, hub.repo_id)
    tokenizer = root / "tokenizers" / tokenizer_path.name
    wanted = {str(prefix / "datasets" / dataset / name): folder / name for name in names}
    wanted[str(prefix / tokenizer_path)] = tokenizer
    sizes = _sizes(hub, list(wanted))
    _check_room(root, sum(sizes[remote] for remote in _missing(wanted, sizes)))
    with (
        making_folder(root),
        making_folder(folder),
        making_folder(tokenizer.parent),
        locked(root / ".download.lock"),
    ):
        _fetch_all(hub, wanted, sizes, make_folder(root / ".download"))
        facts = {"variant": variant, "repo_id": hub.repo_id, "tokenizer_sha256": Tokenizer(tokenizer).sha256}
        write_json(folder / "prepared.json", facts)
        shutil.rmtree(root / ".download", ignore_errors=True)
    return DataPaths(folder, tokenizer)


def _manifest(hub: Hub, path: str) -> Any:
    """What the repository's manifest.json says; nothing of it stays on disk."""
    size = hub.sizes([path]).get(path)
    if size is None:
        raise DataError(f"cannot fetch {path} from {hub.repo_id}: no such file there")
    where = f"manifest.json of {hub.repo_id}"
    if type(size) is not int or not 0 <= size <= JSON_BYTES:
        raise DataError(f"{where}: {size} bytes long; at most {JSON_BYTES} are read")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return read_json(hub.fetch(path, Path(scratch)))
        except DataError:
            raise
        except (OSError, ValueError) as error:
            raise DataError(f"{where}: not of the known form ({getattr(error, 'strerror', None) or error})") from None


def _wanted(manifest: Any, dataset: str, train_shards: int, repo_id: str) -> tuple[list[str], PurePosixPath]:
    """(names of the shard files to have, path of the tokenizer below the prefix), as the manifest tells."""
    where = f"manifest.json of {repo_id}"
    try:
        entry = _named(manifest["datasets"], dataset)
        if entry is None:
            offered = ", ".join(str(other.get("name")) for other in manifest["datasets"][:20])
            raise DataError(f"{where}: no dataset {dataset}; it offers {offered or 'none'}")
        have_train, have_val = (_count(entry["stats"], name, where) for name in ("files_train", "files_val"))
        tokenizer = _named(manifest["tokenizers"], entry["tokenizer_name"])
        if tokenizer is None:
            raise DataError(f"{where}: tokenizer {shortened(entry['tokenizer_name'])} of {dataset} is not listed")
        tokenizer_path = PurePosixPath(tokenizer.get("model_path") or tokenizer["path"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not of the known form ({type(error).__name__}: {error})") from None
    parts = tokenizer_path.parts
    if not parts or not all(map(_NAME.fullmatch, parts)) or ".." in parts:
        raise DataError(
            f"{where}: tokenizer path {shortened(str(tokenizer_path))} leads out of the repository, or has other "
            "characters than A-Z a-z 0-9 _ . -"
        )
    if train_shards > have_train:
        raise UserError(f"{train_shards} training shards of {dataset}; {repo_id} has {have_train}")
    names = [f"fineweb_val_{index:06d}.bin" for index in range(have_val)]
    if entry.get("val_bytes_glob"):
        names += [f"fineweb_val_bytes_{index:06d}.bin" for index in range(have_val)]
    return names + [f"fineweb_train_{index:06d}.bin" for index in range(train_shards)], tokenizer_path


def _count(stats: Any, name: str, where: str) -> int:
    count = stats[name]
    if type(count) is not int or not 0 <= count <= MOST_FILES:
        raise DataError(f"{where}: {name} is {shortened(count)}; accepted is a whole number from 0 to {MOST_FILES}")
    return count


def _named(entries: Iterable[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((entry for entry in entries if entry.get("name") == name), None)


def _sizes(hub: Hub, paths: list[str]) -> dict[str, int]:
    """Bytes of every file, all of which must be there."""
    sizes = hub.sizes(paths)
    for path in paths:
        if path not in sizes:
            raise DataError(f"{hub.repo_id}: no file {path}, although its manifest.json counts it")
        if type(sizes[path]) is not int or sizes[path] < 0:
            raise DataError(f"{hub.repo_id}: {path}: a size of {shortened(sizes[path])} bytes")
    return sizes


def _missing(wanted: dict[str, Path], sizes: dict[str, int]) -> list[str]:
    """The remote paths of files that are not there whole already."""
    return [remote for remote, local in wanted.items() if not _is_whole(local, sizes[remote])]


def _check_room(root: Path, need: int) -> None:
    there = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if need > free:
        raise UserError(
            f"{need / 1e9:.1f} GB to download and {free / 1e9:.1f} GB free in {root}; "
            "make room, name another --root or take fewer --train-shards"
        )


def _fetch_all(hub: Hub, wanted: dict[str, Path], sizes: dict[str, int], staging: Path) -> None:
    """Bring every file of `wanted` (remote path -> local path) that is missing."""
    for remote in progress(_missing(wanted, sizes), f"download {hub.repo_id}", unit="file"):
        arrived = hub.fetch(remote, staging)
        try:
            _check(arrived, sizes[remote])
        except DataError as error:
            arrived.unlink(missing_ok=True)  # so that the next attempt does not find it
            raise DataError(f"{hub.repo_id}: {remote}: {error}") from None
        os.replace(arrived, wanted[remote])


def _is_whole(path: Path, size: int) -> bool:
    try:
        _check(path, size)
    except DataError:
        return False
    return True


def _check(path: Path, size: int) -> None:
    """`DataError` unless `path` has `size` bytes and reads as what its name says."""
    try:
        found = file_bytes(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if found != size:
        raise DataError(f"{path}: {found} bytes arrived, the repository says {size}")
    if path.suffix == ".bin":
        read_token_count(path)
    elif path.suffix == ".model":
        Tokenizer(path)
