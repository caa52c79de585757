import hashlib
import http.server
import json
import math
import re
import shutil
import socket
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pgolf.cli import main
from pgolf.data import download as module
from pgolf.data.download import HuggingFaceHub, download
from pgolf.data.inspect import inspect_folder
from pgolf.data.shards import read_shard, write_shard
from pgolf.errors import DataError, UserError

REPO = "somebody/a-dataset"
NAME = "fineweb10B_sp1024"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    monkeypatch.delenv("MATCHED_FINEWEB_REPO_ID", raising=False)
    monkeypatch.delenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def remote(tmp_path, demo) -> Path:
    """The files of a published repository: two training shards, one validation shard, the tokenizer."""
    folder = tmp_path / "remote" / "datasets"
    shards = folder / "datasets" / NAME
    shards.mkdir(parents=True)
    (folder / "tokenizers").mkdir()
    shutil.copyfile(demo.tokenizer_path, folder / "tokenizers" / "fineweb_1024_bpe.model")
    tokens = np.array(read_shard(demo.data_path / "demo_train_000000.bin"))
    write_shard(shards / "fineweb_train_000000.bin", tokens[:30_000])
    write_shard(shards / "fineweb_train_000001.bin", tokens[30_000:60_000])
    write_shard(shards / "fineweb_val_000000.bin", np.array(read_shard(demo.data_path / "demo_val_000000.bin")))
    change_manifest(tmp_path / "remote", lambda manifest: None)
    return tmp_path / "remote"


def change_manifest(remote: Path, change) -> None:
    manifest = {
        "datasets": [
            {"name": "fineweb10B_byte260", "tokenizer_name": "bytes", "stats": {"files_train": 1, "files_val": 1}},
            {
                "name": NAME,
                "tokenizer_name": "sp_bpe_1024",
                "stats": {"files_train": 2, "files_val": 1},
            },
        ],
        "tokenizers": [{"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
    }
    change(manifest)
    (remote / "datasets" / "manifest.json").write_text(json.dumps(manifest))


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


def _damage(remote: Path, name: str, damage) -> None:
    path = remote / "datasets" / "datasets" / NAME / name
    path.write_bytes(damage(path.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-2], "byte 8: 30000 tokens make a file of 61024 bytes, this one has 61022"),
        (lambda raw: b"\0" + raw[1:], "byte 0: magic number"),
        (lambda raw: b"", "header ends at byte 0"),
    ],
)
def test_a_damaged_shard_is_refused_and_not_kept(tmp_path, remote, damage, message):
    _damage(remote, "fineweb_train_000000.bin", damage)
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


# With the real library, against a server on this machine that answers as the hub does.


class StandIn(http.server.ThreadingHTTPServer):
    """Serves one dataset repository. `cut` names files whose next transfer breaks off half way."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.requests, self.cut, self.always_cut = folder, [], set(), set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # connections that we cut


class Answer(http.server.BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _file(self) -> Path | None:
        prefix = f"/datasets/{REPO}/resolve/main/"
        path = urllib.parse.unquote(self.path.partition("?")[0])
        file = self.server.folder / path.removeprefix(prefix)
        if path.startswith(prefix) and file.is_file():
            return file
        code = "EntryNotFound" if path.startswith(f"/datasets/{REPO}/") else "RepoNotFound"
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def _head(self, file: Path, first: int, content: bytes) -> None:
        self.send_response(206 if first else 200)
        self.send_header("X-Repo-Commit", "0123456789abcdef" * 2 + "01234567")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()

    def do_HEAD(self):
        if (file := self._file()) is not None:
            self._head(file, 0, file.read_bytes())

    def do_GET(self):
        if (file := self._file()) is None:
            return
        content = file.read_bytes()
        asked = self.headers.get("Range", "")
        first = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        self.server.requests.append((file.name, first))
        self._head(file, first, content)
        if file.name in self.server.cut | self.server.always_cut:
            self.server.cut.discard(file.name)
            self.wfile.write(content[first : first + len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
        else:
            self.wfile.write(content[first:])

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path != f"/api/datasets/{REPO}/paths-info/main":
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if "json" in self.headers.get("Content-Type", ""):
            wanted = json.loads(body)["paths"]
        else:
            wanted = urllib.parse.parse_qs(body)["paths"]
        found = [
            {"type": "file", "path": path, "size": (self.server.folder / path).stat().st_size, "oid": "0" * 40}
            for path in wanted
            if (self.server.folder / path).is_file()
        ]
        answer = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@pytest.fixture
def server(remote, tmp_path, monkeypatch):
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="needs huggingface_hub: pip install 'pgolf[data]'"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    with StandIn(remote) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_through_the_real_library(tmp_path, server, remote):
    paths = download("sp1024", tmp_path / "data", 2, HuggingFaceHub(REPO, server.url))
    assert inspect_folder(paths.data_path)["problems"] == []
    for path in paths.data_path.glob("*.bin"):
        assert path.read_bytes() == (remote / "datasets" / "datasets" / NAME / path.name).read_bytes()
    before = len(server.requests)
    download("sp1024", tmp_path / "data", 2, HuggingFaceHub(REPO, server.url))
    assert [name for name, _ in server.requests[before:]] == ["manifest.json"]


def test_an_interrupted_transfer_is_resumed(tmp_path, server):
    server.cut = {"fineweb_train_000000.bin"}
    paths = download("sp1024", tmp_path / "data", 1, HuggingFaceHub(REPO, server.url))
    starts = [first for name, first in server.requests if name == "fineweb_train_000000.bin"]
    assert starts[0] == 0
    assert 0 < starts[1] < 61024  # it went on where the connection broke
    assert inspect_folder(paths.data_path)["problems"] == []


def test_a_shard_cut_short_on_the_server_is_refused(tmp_path, server, remote):
    _damage(remote, "fineweb_val_000000.bin", lambda raw: raw[:-10])
    with pytest.raises(DataError, match=r"fineweb_val_000000.bin: byte 8: \d+ tokens make a file of"):
        download("sp1024", tmp_path / "data", 1, HuggingFaceHub(REPO, server.url))
    assert not list((tmp_path / "data").rglob("*.bin"))


def test_what_the_server_does_not_have(tmp_path, server, remote):
    with pytest.raises(DataError, match="somebody/else: no such dataset"):
        download("sp1024", tmp_path / "data", 1, HuggingFaceHub("somebody/else", server.url))
    (remote / "datasets" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest.json from .*: no such file there"):
        download("sp1024", tmp_path / "data", 1, HuggingFaceHub(REPO, server.url))


@pytest.fixture
def dead_url(server) -> str:
    """Where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_no_network_is_one_line_at_once_and_leaves_nothing(tmp_path, dead_url, monkeypatch, capfd):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("the library tries again"))
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(module, "HuggingFaceHub", lambda repo_id: HuggingFaceHub(repo_id, dead_url))
    assert main(["data", "download", "--root", str(tmp_path / "data")]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "no connection; check the network and run the same command again" in output.err
    assert set(tmp_path.rglob("*")) == before


def test_a_network_that_goes_away_meanwhile(tmp_path, dead_url, monkeypatch, capfd):
    hub = HuggingFaceHub(REPO, dead_url)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits between its attempts
    with pytest.raises(DataError, match="no connection; check the network") as caught:
        hub.fetch("datasets/manifest.json", tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_slow_answer_is_no_missing_network(tmp_path, server, monkeypatch):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.05)
    answer = Answer.do_HEAD

    def slow(self):
        time.sleep(0.3 if self.path == "/" else 0)
        answer(self)

    monkeypatch.setattr(Answer, "do_HEAD", slow)
    HuggingFaceHub(REPO, server.url).check_connection()


def test_the_library_told_to_stay_offline(tmp_path, server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set; unset it"):
        HuggingFaceHub(REPO, server.url).sizes(["datasets/manifest.json"])
