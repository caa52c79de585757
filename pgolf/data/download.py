"""FineWeb shards as the community publishes them on Hugging Face.

A repository's `<prefix>/manifest.json` lists its datasets (name, number of shards, tokenizer) and tokenizers (path).
Files land in the community's layout, `<root>/datasets/<dataset>/fineweb_train_000000.bin` and
`<root>/tokenizers/*.model`, each under its name only when its size and header are right; those that are there already
are kept. MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name another repository and folder, as in the
challenge's own downloader.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pgolf.data.prepare import DataPaths, locked
from pgolf.data.shards import read_token_count
from pgolf.data.tokenizer import Tokenizer
from pgolf.errors import DataError, UserError
from pgolf.files import make_folder, write_json
from pgolf.presets import DEFAULT_TRAIN_SHARDS
from pgolf.progress import progress

DEFAULT_PREFIX = "datasets"


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
            from huggingface_hub.utils import disable_progress_bars
        except ImportError:
            raise UserError("downloading needs huggingface_hub; install it with: pip install 'pgolf[data]'") from None
        disable_progress_bars()  # one bar over all files is ours
        self.repo_id = repo_id
        self._endpoint = endpoint
        self._hub = huggingface_hub

    def sizes(self, paths: list[str]) -> dict[str, int]:
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
        if names & {"LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"}:
            return DataError(f"{where}: no connection; check the network and run the same command again to go on")
        reason = str(error).strip().splitlines() or [""]
        return DataError(f"{where}: {type(error).__name__}: {reason[0]}; run the same command again to go on")


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
    root = make_folder(root)
    folder = make_folder(root / "datasets" / dataset)
    staging = make_folder(root / ".download")
    with locked(root / ".download.lock"):
        manifest_path = hub.fetch(str(prefix / "manifest.json"), staging)
        names, tokenizer_path = _wanted(manifest_path, dataset, train_shards, hub.repo_id)
        tokenizer = make_folder(root / "tokenizers") / tokenizer_path.name
        wanted = {str(prefix / "datasets" / dataset / name): folder / name for name in names}
        wanted[str(prefix / tokenizer_path)] = tokenizer
        _fetch_all(hub, wanted, staging)
        write_json(
            folder / "prepared.json",
            {"variant": variant, "repo_id": hub.repo_id, "tokenizer_sha256": Tokenizer(tokenizer).sha256},
        )
        shutil.rmtree(staging, ignore_errors=True)
    return DataPaths(folder, tokenizer)


def _wanted(manifest_path: Path, dataset: str, train_shards: int, repo_id: str) -> tuple[list[str], PurePosixPath]:
    """(names of the shard files to have, path of the tokenizer below the prefix), as the manifest tells."""
    where = f"manifest.json of {repo_id}"
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        entry = _named(manifest["datasets"], dataset)
        if entry is None:
            offered = ", ".join(str(other.get("name")) for other in manifest["datasets"])
            raise DataError(f"{where}: no dataset {dataset}; it offers {offered or 'none'}")
        have_train, have_val = int(entry["stats"]["files_train"]), int(entry["stats"]["files_val"])
        tokenizer = _named(manifest["tokenizers"], entry["tokenizer_name"])
        if tokenizer is None:
            raise DataError(f"{where}: tokenizer {entry['tokenizer_name']} of {dataset} is not listed")
        tokenizer_path = PurePosixPath(tokenizer.get("model_path") or tokenizer["path"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: not of the known form ({type(error).__name__}: {error})") from None
    if tokenizer_path.is_absolute() or ".." in tokenizer_path.parts:
        raise DataError(f"{where}: tokenizer path {tokenizer_path} leads out of the repository")
    if train_shards > have_train:
        raise UserError(f"{train_shards} training shards of {dataset}; {repo_id} has {have_train}")
    names = [f"fineweb_val_{index:06d}.bin" for index in range(have_val)]
    if entry.get("val_bytes_glob"):
        names += [f"fineweb_val_bytes_{index:06d}.bin" for index in range(have_val)]
    return names + [f"fineweb_train_{index:06d}.bin" for index in range(train_shards)], tokenizer_path


def _named(entries: Iterable[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((entry for entry in entries if entry.get("name") == name), None)


def _fetch_all(hub: Hub, wanted: dict[str, Path], staging: Path) -> None:
    """Bring every file of `wanted` (remote path -> local path) that is not there whole already."""
    sizes = hub.sizes(list(wanted))
    for remote in wanted:
        if remote not in sizes:
            raise DataError(f"{hub.repo_id}: no file {remote}, although its manifest.json counts it")
    missing = [remote for remote, local in wanted.items() if not _is_whole(local, sizes[remote])]
    need, free = sum(sizes[remote] for remote in missing), shutil.disk_usage(staging).free
    if need > free:
        raise UserError(
            f"{need / 1e9:.1f} GB to download and {free / 1e9:.1f} GB free in {staging.parent}; "
            "make room, name another --root or take fewer --train-shards"
        )
    for remote in progress(missing, f"download {hub.repo_id}", unit="file"):
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
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if found != size:
        raise DataError(f"{path}: {found} bytes arrived, the repository says {size}")
    if path.suffix == ".bin":
        read_token_count(path)
    elif path.suffix == ".model":
        Tokenizer(path)
