"""Downloads with the real library, against a server on this machine that answers as the hub does."""

import hashlib
import http.server
import json
import socket
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
from published_dataset import NAME, REPO, damage_file

from pgolf.cli import main
from pgolf.data import download as module
from pgolf.data.download import HuggingFaceHub, download
from pgolf.data.inspect import inspect_folder
from pgolf.errors import DataError

pytestmark = pytest.mark.usefixtures("plain_environment")


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
    damage_file(remote, "fineweb_val_000000.bin", lambda raw: raw[:-10])
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
