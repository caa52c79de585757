"""Downloads from a repository that is a folder: what is fetched, kept, mended and refused."""

import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from published_dataset import NAME, REPO, change_manifest, damage_file

from pgolf.data import download as module
from pgolf.data.download import download
from pgolf.data.inspect import inspect_folder
from pgolf.data.shards import read_shard, write_shard
from pgolf.errors import DataError, UserError

pytestmark = pytest.mark.usefixtures("plain_environment")


class FolderHub:
    """A repository that is a folder; `broken` fails the files whose names it holds."""

    repo_id = REPO

    def __init__(self, folder: Path):
        self.folder, self.fetched, self.broken = folder, [], set()

    def sizes(self, paths: list[str]) -> dict[str, int]:
        return {path: (self.folder / path).stat().st_size for path in paths if (self.folder / path).exists()}

    def fetch(self, path: str, folder: Path) -> Path:
        name = path.rpartition("/")[2]
        self.fetched.append(name)
        if name in self.broken:
            raise DataError(f"cannot fetch {path}: broken")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(self.folder / path, folder / path))


def test_the_community_layout(tmp_path, remote):
    paths = download("sp1024", tmp_path / "data", 2, FolderHub(remote))
    assert paths.data_path == tmp_path / "data" / "datasets" / NAME
    assert paths.tokenizer_path == tmp_path / "data" / "tokenizers" / "fineweb_1024_bpe.model"
    for path in paths.data_path.glob("*.bin"):
        assert path.read_bytes() == (remote / "datasets" / "datasets" / NAME / path.name).read_bytes()
    assert len(list(paths.data_path.glob("*.bin"))) == 3
    facts = inspect_folder(paths.data_path)
    assert facts["problems"] == []
    assert facts["tokenizer"] == str(paths.tokenizer_path)
    assert not (tmp_path / "data" / ".download").exists()


def test_only_the_asked_for_training_shards(tmp_path, remote):
    hub = FolderHub(remote)
    paths = download("sp1024", tmp_path / "data", 0, hub)
    assert hub.fetched == ["manifest.json", "fineweb_val_000000.bin", "fineweb_1024_bpe.model"]
    download("sp1024", tmp_path / "data", 1, hub)
    assert hub.fetched[3:] == ["manifest.json", "fineweb_train_000000.bin"]
    assert [path.name for path in paths.data_path.glob("*_train_*")] == ["fineweb_train_000000.bin"]


def test_going_on_after_a_failure_and_mending_what_is_damaged(tmp_path, remote):
    hub = FolderHub(remote)
    hub.broken = {"fineweb_train_000001.bin"}
    with pytest.raises(DataError, match="broken"):
        download("sp1024", tmp_path / "data", 2, hub)
    folder = tmp_path / "data" / "datasets" / NAME
    (folder / "fineweb_val_000000.bin").write_bytes(b"cut short")
    hub.broken, hub.fetched = set(), []
    download("sp1024", tmp_path / "data", 2, hub)
    assert hub.fetched == [
        "manifest.json",
        "fineweb_val_000000.bin",
        "fineweb_train_000001.bin",
        "fineweb_1024_bpe.model",
    ]
    assert inspect_folder(folder)["problems"] == []


def test_sidecars_come_along(tmp_path, remote, demo, monkeypatch):
    monkeypatch.setitem(module.VARIANTS, "caseops", module.Variant(REPO, NAME))
    change_manifest(remote, lambda manifest: manifest["datasets"][1].update(val_bytes_glob="fineweb_val_bytes_*.bin"))
    counts = np.ones(len(read_shard(demo.data_path / "demo_val_000000.bin")), dtype=np.uint16)
    write_shard(remote / "datasets" / "datasets" / NAME / "fineweb_val_bytes_000000.bin", counts)
    paths = download("caseops", tmp_path / "data", 0, FolderHub(remote))
    assert (paths.data_path / "fineweb_val_bytes_000000.bin").is_file()


def test_another_folder_of_the_repository(tmp_path, remote, monkeypatch):
    (remote / "datasets").rename(remote / "other")
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "other")
    download("sp1024", tmp_path / "a", 1, FolderHub(remote))
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "")
    download("sp1024", tmp_path / "b", 1, FolderHub(remote / "other"))
    for name in ("a", "b"):
        assert (tmp_path / name / "datasets" / NAME / "fineweb_train_000000.bin").is_file()


def test_another_repository(tmp_path, monkeypatch):
    asked = []

    def hub(repo_id):
        asked.append(repo_id)
        raise DataError("enough")

    monkeypatch.setattr(module, "HuggingFaceHub", hub)
    for _ in range(2):
        with pytest.raises(DataError, match="enough"):
            download("sp8192", tmp_path)
        monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "me/mine")
    assert asked == ["kevclark/parameter-golf", "me/mine"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-2], "byte 8: 30000 tokens make a file of 61024 bytes, this one has 61022"),
        (lambda raw: b"\0" + raw[1:], "byte 0: magic number"),
        (lambda raw: b"", "header ends at byte 0"),
    ],
)
def test_a_damaged_shard_is_refused_and_not_kept(tmp_path, remote, damage, message):
    damage_file(remote, "fineweb_train_000000.bin", damage)
    with pytest.raises(DataError, match=message) as caught:
        download("sp1024", tmp_path / "data", 1, FolderHub(remote))
    assert REPO in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").rglob("fineweb_train_*"))


def test_a_size_that_differs_from_the_repository_is_refused(tmp_path, remote):
    hub = FolderHub(remote)
    hub.sizes = lambda paths: {path: size + 2 for path, size in FolderHub.sizes(hub, paths).items()}
    with pytest.raises(DataError, match="bytes arrived, the repository says"):
        download("sp1024", tmp_path / "data", 1, hub)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["datasets"].pop(1), f"no dataset {NAME}; it offers fineweb10B_byte260"),
        (lambda m: m["tokenizers"].clear(), "tokenizer 'sp_bpe_1024' of .* is not listed"),
        (lambda m: m.pop("datasets"), "not of the known form"),
        (lambda m: m["datasets"][1].pop("stats"), "not of the known form"),
        (lambda m: m["datasets"][1].update(stats=[]), "not of the known form"),
        (lambda m: m["tokenizers"][0].update(model_path="../../etc/x.model"), "leads out of the repository"),
        (lambda m: m["tokenizers"][0].update(model_path="/etc/x.model"), "leads out of the repository"),
        (lambda m: m["tokenizers"][0].update(model_path=".", path="."), "leads out of the repository"),
        (lambda m: m["tokenizers"][0].update(model_path="tokenizers/\ud800.model"), "has other characters"),
        (lambda m: m["tokenizers"][0].update(model_path="tokenizers/\x1b[31m.model"), "has other characters"),
        (lambda m: m["tokenizers"][0].update(model_path="x" * 5000), "has other characters"),
        (lambda m: m["tokenizers"][0].update(model_path=["a"]), "not of the known form"),
        (lambda m: m.update(datasets={"name": 1}), "not of the known form"),
        (lambda m: m.update(datasets=[7]), "not of the known form"),
        (lambda m: m["datasets"][1]["stats"].update(files_val=10**7), "files_val is 10000000; accepted is a whole"),
        (lambda m: m["datasets"][1]["stats"].update(files_val=math.inf), "files_val is inf; accepted"),
        (lambda m: m["datasets"][1]["stats"].update(files_train=-1), "files_train is -1; accepted"),
        (lambda m: m["datasets"][1]["stats"].update(files_train="2"), "files_train is '2'; accepted"),
        (lambda m: m["datasets"][1]["stats"].update(files_train=3), "no file .*000002.bin, although"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path, remote, change, message):
    change_manifest(remote, change)
    with pytest.raises(DataError, match=message) as caught:
        download("sp1024", tmp_path / "data", 3 if "000002" in message else 1, FolderHub(remote))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"datasets": ' + "9" * 5000 + "}", "\ud800"])
def test_manifests_that_are_none(tmp_path, remote, text):
    (remote / "datasets" / "manifest.json").write_bytes(text.encode("utf-8", errors="surrogatepass"))
    with pytest.raises(DataError, match=r"manifest.json of .*: not of the known form") as caught:
        download("sp1024", tmp_path / "data", 1, FolderHub(remote))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("size", "message"), [(None, "no such file"), (10**9, "at most 16000000"), ("3", "at most")])
def test_a_manifest_of_a_wrong_size_is_not_fetched(tmp_path, remote, size, message):
    hub = FolderHub(remote)
    hub.sizes = lambda paths: dict.fromkeys(paths, size)
    with pytest.raises(DataError, match=message):
        download("sp1024", tmp_path / "data", 1, hub)
    assert hub.fetched == []


@pytest.mark.parametrize("size", [None, -1, 1.5, "7"])
def test_sizes_that_are_none_are_refused(tmp_path, remote, size):
    hub = FolderHub(remote)
    hub.sizes = lambda paths: {**FolderHub.sizes(hub, paths), **{path: size for path in paths if "_val_" in path}}
    with pytest.raises(DataError, match=r"fineweb_val_000000.bin: a size of .* bytes"):
        download("sp1024", tmp_path / "data", 1, hub)


def test_wrong_requests(tmp_path, remote, monkeypatch):
    hub = FolderHub(remote)
    with pytest.raises(UserError, match="unknown variant 'sp4097'; accepted are sp1024, sp4096, sp8192, caseops"):
        download("sp4097", tmp_path / "data", 1, hub)
    with pytest.raises(UserError, match="-1 training shards"):
        download("sp1024", tmp_path / "data", -1, hub)
    with pytest.raises(UserError, match=f"3 training shards of {NAME}; {REPO} has 2"):
        download("sp1024", tmp_path / "data", 3, hub)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"0.0 GB free in .*data; make room"):
        download("sp1024", tmp_path / "data", 1, hub)
    assert not (tmp_path / "data").exists()


def test_without_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=re.escape("pip install 'pgolf[data]'")):
        download("sp1024", tmp_path)
