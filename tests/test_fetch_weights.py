"""make weights against a real server on loopback that breaks connections, expires links,
serves wrong bytes and ignores ranges."""

from __future__ import annotations

import errno
import functools
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from project import ROOT, make
from synthetic import write_model

from scripts import fetch_weights, reports, room
from scripts.fetching import meta as meta_source
from scripts.fetching import source
from scripts.weights.forms import form_of

SEGMENT = 10_000
SECRET = "Policy=abc&Signature=s3cr3t~x__&Key-Pair-Id=K1"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Web:
    """A server of files. Each request may be spoilt: spoil(path, start) says with what."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.tells_version = True  # by an ETag of the content
        self.spoil: Callable[[str, int], tuple[str, Any] | None] = lambda path, start: None
        self.asked: list[tuple[str, int, str]] = []  # path, first byte, query
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                path = urllib.parse.unquote(path)
                found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                start = int(found[1]) if found else 0
                with web.lock:
                    web.asked.append((path, start, query))
                    web.headers.append(dict(self.headers))
                    spoilt = web.spoil(path, start)
                data = web.files.get(path)
                if spoilt and spoilt[0] == "status":
                    return self.answer(spoilt[1], b"<Error>no</Error>")
                if data is None:
                    return self.answer(404, b"not here")
                if spoilt and spoilt[0] == "flip":
                    at = spoilt[1]
                    data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                if spoilt and spoilt[0] == "packed":
                    return self.answer(200, gzip.compress(bytes(data)), spoilt)
                if not web.ranges or found is None or self.headers.get("If-Range", self.etag(data)) != self.etag(data):
                    return self.answer(200, bytes(data), spoilt, etag=self.etag(data))
                if spoilt and spoilt[0] == "shifted" and found[2]:
                    return self.answer(206, bytes(data[: int(found[2]) + 1 - start]), None, 0, len(data))
                if start >= len(data):
                    return self.answer(416, b"", total=len(data))
                end = min(int(found[2]) + 1 if found[2] else len(data), len(data))
                return self.answer(206, bytes(data[start:end]), spoilt, start, len(data), self.etag(data))

            @staticmethod
            @functools.lru_cache
            def etag(data: bytes) -> str:
                return f'"{hashlib.md5(data).hexdigest()}"'

            def answer(
                self, status: int, body: bytes, spoilt: Any = None, start: int = 0, total: int = 0, etag: str = ""
            ) -> None:
                self.send_response(status)
                if etag and web.tells_version:
                    self.send_header("ETag", etag)
                if spoilt and spoilt[0] == "packed":
                    self.send_header("Content-Encoding", "gzip")
                self.send_header("Content-Length", str(len(body)))
                if status == 206:
                    self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
                if path_type := web.files.get("content-type " + self.path.partition("?")[0]):
                    self.send_header("Content-Type", path_type.decode())
                self.end_headers()
                if spoilt and spoilt[0] == "cut":
                    self.wfile.write(body[: spoilt[1]])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.close()
                    return
                try:
                    self.wfile.write(body)
                except OSError:  # who asked has read enough
                    self.close_connection = True

            def log_message(self, *words: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def bytes_asked_from(self, name: str) -> list[int]:
        return [start for path, start, _ in self.asked if path.endswith(name)]

    def end(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(fetch_weights, "SEGMENT_BYTES", SEGMENT)
    monkeypatch.setattr(fetch_weights, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(source, "PIECE_BYTES", 1000)
    for name in ("META_URL", "META_URL_FILE", "MIRROR_URL", "MIRROR_URL_FILE", "HF_TOKEN", "ROOM_ARGS", "ROOM_NEEDS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Web()
    yield server
    server.end()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A whole model in Meta's form with its checklists: file name -> content."""
    folder = write_model(tmp_path_factory.mktemp("model") / "meta", n_shards=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    lists = {
        "checklist.chk": [name for name in files if name != "tokenizer.model"],
        "tokenizer_checklist.chk": ["tokenizer.model"],
    }
    for name, listed in lists.items():
        files[name] = "".join(f"{hashlib.md5(files[one]).hexdigest()}  {one}\n" for one in listed).encode()
    return files


@pytest.fixture
def meta(web: Web, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Web:
    """The model on Meta's server, and a link to it in META_URL."""
    for name, data in model.items():
        web.files["/" + ("" if name.startswith("tokenizer") else "llama-2-7b/") + name] = data
    monkeypatch.setenv("META_URL", f"{web.url}/*?{SECRET}")
    return web


def fetch(source: str, output: Path) -> Path:
    try:
        fetch_weights.fetch_weights(fetch_weights.Settings(source, output))
    except reports.Finished:
        pass
    return output


def refused(source: str, output: Path) -> reports.Problem:
    with pytest.raises(reports.Problem) as caught:
        fetch(source, output)
    report = caught.value.report()
    assert not output.exists() and report.splitlines()[-1].startswith("    ")
    assert "s3cr3t" not in report and "s3cr3t" not in str(caught.value.as_json())
    return caught.value


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in ("args", "args.sha256", room.MANIFEST)
    }


# --- Meta -------------------------------------------------------------------------------------------------------------


def test_metas_download_arrives_whole_and_its_manifest_knows_every_file_and_no_secret(
    meta: Web, model: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = fetch("meta:llama-2-7b", tmp_path / "weights")
    assert files_of(folder) == model
    text = (folder / room.MANIFEST).read_text()
    manifest = json.loads(text)
    assert {name: record["sha256"] for name, record in manifest["files"].items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in model.items()
    }
    assert (manifest["room"], manifest["arguments"]) == ("weights", {"source": "meta:llama-2-7b"})
    said = "".join(capfd.readouterr())
    assert "s3cr3t" not in text + said and not list(tmp_path.glob("*.partial"))
    assert {query for _, _, query in meta.asked} == {SECRET}
    # large files came in several parts
    assert len(set(meta.bytes_asked_from("consolidated.00.pth"))) > 10
    asked = len(meta.asked)
    fetch("meta:llama-2-7b", tmp_path / "weights")
    assert len(meta.asked) == asked, "what is whole is not asked for again"


def test_the_link_may_lie_in_a_file(meta: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").write_text(os.environ["META_URL"] + "\n")
    monkeypatch.delenv("META_URL")
    monkeypatch.setenv("META_URL_FILE", str(tmp_path / "link"))
    assert (fetch("meta:llama-2-7b", tmp_path / "weights") / "params.json").is_file()


def test_connections_that_break_all_the_time_lose_nothing(meta: Web, model: dict[str, bytes], tmp_path: Path) -> None:
    chance = random.Random(0)
    meta.spoil = lambda path, start: (
        ("cut", chance.randrange(1, 4000)) if chance.random() < 0.5 and "pth" in path else None
    )
    assert files_of(fetch("meta:llama-2-7b", tmp_path / "weights")) == model


def test_after_an_expired_link_only_what_is_missing_is_asked_for(
    meta: Web, model: dict[str, bytes], tmp_path: Path
) -> None:
    meta.spoil = lambda path, start: ("status", 403) if start >= 150_000 and "01.pth" in path else None
    problem = refused("meta:llama-2-7b", tmp_path / "weights")
    assert "403" in problem.seen and "META_URL_FILE" in problem.command and "Downloaded data is kept" in problem.advice
    kept = json.loads((tmp_path / "weights.partial" / room.FINISHED).read_text())["begun"]
    here = {int(start) for start, size in kept["consolidated.01.pth.part"].items() if size == SEGMENT}
    assert here  # how many of the 15 segments before it had come in when the link expired is the network's to say
    meta.spoil, meta.asked = lambda path, start: None, []
    assert files_of(fetch("meta:llama-2-7b", tmp_path / "weights")) == model
    again = meta.bytes_asked_from("01.pth")[1:]  # the first asks how long the file is
    segments = len(model["consolidated.01.pth"]) // SEGMENT + 1
    assert not here & set(again) and len(here) + len(again) <= segments


def test_after_kill_9_the_same_command_goes_on(meta: Web, model: dict[str, bytes], tmp_path: Path) -> None:
    arrived = threading.Event()

    def slow(path: str, start: int) -> None:
        if start >= 200_000 and "00.pth" in path:
            arrived.set()
            killed.wait(60)

    killed = threading.Event()
    meta.spoil = slow
    code = "from scripts import reports, fetch_weights as f\nf.SEGMENT_BYTES = 10_000\nf.CONNECTIONS = 1\nreports.run(f.main)"
    command = [sys.executable, "-c", code, "--source=meta:llama-2-7b", "--output", str(tmp_path / "weights")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert arrived.wait(60)
        process.kill()
    killed.set()
    kept = json.loads((tmp_path / "weights.partial" / room.FINISHED).read_text())["begun"]["consolidated.00.pth.part"]
    assert sum(kept.values()) >= 190_000
    meta.spoil, meta.asked = lambda path, start: None, []
    assert files_of(fetch("meta:llama-2-7b", tmp_path / "weights")) == model
    assert min(meta.bytes_asked_from("00.pth")[1:]) >= 190_000


def test_a_server_that_ignores_ranges_is_read_by_one_connection(
    meta: Web, model: dict[str, bytes], tmp_path: Path
) -> None:
    meta.ranges = False
    broken: list[Any] = []

    def once(path: str, start: int) -> tuple[str, int] | None:
        if "00.pth" in path and len(broken) < 3:
            broken.append(path)
            return ("cut", 50_000)
        return None

    meta.spoil = once
    assert files_of(fetch("meta:llama-2-7b", tmp_path / "weights")) == model


def test_a_wrong_byte_is_found_named_and_fetched_again(meta: Web, model: dict[str, bytes], tmp_path: Path) -> None:
    meta.spoil = lambda path, start: ("flip", 77_777) if "01.pth" in path else None
    problem = refused("meta:llama-2-7b", tmp_path / "weights")
    assert "CONSOLIDATED.01.PTH IS NOT THE FILE" in problem.report() and "md5 should be" in problem.seen
    meta.spoil, meta.asked = lambda path, start: None, []
    assert files_of(fetch("meta:llama-2-7b", tmp_path / "weights")) == model
    assert set(meta.bytes_asked_from("00.pth")) <= {0}, "the good file is kept"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path, start: ("status", 403), "403"),
        (lambda path, start: ("status", 404) if "params" in path else None, "404 for params.json: it does not exist"),
        (lambda path, start: ("status", 500) if "01.pth" in path else None, "the server answers 500"),
        (lambda path, start: ("cut", 0) if "01.pth" in path and start else None, "after several tries"),
    ],
    ids=["expired", "missing", "server error", "no connection holds"],
)
def test_what_the_server_does_not_give_is_a_report(spoil: Any, says: str, meta: Web, tmp_path: Path) -> None:
    meta.spoil = spoil
    assert says in refused("meta:llama-2-7b", tmp_path / "weights").seen


def test_an_error_page_is_no_checklist(meta: Web, tmp_path: Path) -> None:
    meta.files["/llama-2-7b/checklist.chk"] = b"<html>Access Denied</html>"
    assert "not a list of md5 sums" in refused("meta:llama-2-7b", tmp_path / "weights").seen
    meta.files["/llama-2-7b/checklist.chk"] = b"d41d8cd98f00b204e9800998ecf8427e  ../../etc/passwd\n"
    assert "not a list of md5 sums" in refused("meta:llama-2-7b", tmp_path / "weights").seen


def test_a_full_disk_is_told_before_anything_is_fetched(
    meta: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500_000))
    problem = refused("meta:llama-2-7b", tmp_path / "weights")
    assert "THE DISK IS TOO SMALL" in problem.report() and "Nothing was fetched" in problem.seen
    assert "798.0 kB must still be downloaded; 500.0 kB are free" in problem.seen
    assert max(len(set(meta.bytes_asked_from(name))) for name in ("00.pth", "01.pth")) == 1


@pytest.mark.parametrize(
    "url", ["", "https://host/without-a-star?Policy=s3cr3t", "Policy=s3cr3t", "ftp://host/*?s3cr3t"]
)
def test_what_is_no_link_of_metas_is_told_and_not_shown(
    url: str, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("META_URL", url)
    assert "NO URL FROM META" in refused("meta:llama-2-7b", tmp_path / "weights").report()


def test_what_a_full_disk_cut_off_is_not_counted_again(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other file is empty, so that no note of its arrival tells the next try of this one."""
    files = {"config.json": b"", "model.safetensors": os.urandom(300_000)}
    web.files.update({f"/m/{name}": data for name, data in files.items()})
    monkeypatch.setattr(fetch_weights, "SEGMENT_BYTES", 1 << 20)
    plain_note = room.Filling.note

    def note(filling: room.Filling, begun: Any) -> None:
        if begun.get("model.safetensors.part"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain_note(filling, begun)

    monkeypatch.setattr(room.Filling, "note", note)
    with pytest.raises(OSError, match="No space left"):  # the weights are there, and what tells so finds no place
        fetch(f"{web.url}/m", tmp_path / "weights")
    monkeypatch.setattr(room.Filling, "note", plain_note)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000))
    assert files_of(fetch(f"{web.url}/m", tmp_path / "weights")) == files


def test_a_folder_that_make_did_not_fetch_is_not_touched(meta: Web, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/mine").write_text("")
    with pytest.raises(reports.Problem, match="not a folder that make has fetched"):
        fetch("meta:llama-2-7b", tmp_path / "weights")
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["mine"]


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(web: Web, monkeypatch: pytest.MonkeyPatch) -> Web:
    """A hub with one repository of three files, two of them large ones (LFS)."""
    import huggingface_hub.constants

    files = {"config.json": b'{"a": 1}', "tokenizer.json": b"{}" * 9000, "model.safetensors": os.urandom(55_000)}
    siblings = []
    for name, data in {
        **files,
        "pytorch_model.bin": b"x",
        "original/consolidated.00.pth": b"x",
        "modeling.py": b"x",
    }.items():
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        large = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
        siblings.append(
            {"rfilename": name, "size": len(data), "blobId": git, **({"lfs": large} if "model" in name else {})}
        )
        web.files[f"/some/llama/resolve/{COMMIT}/{name}"] = data
    info = json.dumps(
        {"id": "some/llama", "sha": COMMIT, "siblings": siblings, "private": False, "gated": False, "tags": []}
    ).encode()
    for revision in ("", "/revision/main", f"/revision/{COMMIT}"):
        web.files[f"/api/models/some/llama{revision}"] = info
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    # as if HF_ENDPOINT had been set before huggingface_hub was imported
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
        huggingface_hub.constants.ENDPOINT, web.url
    )
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", web.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t")
    return web


@pytest.mark.parametrize("source", ["hf:some/llama", f"hf:some/llama@{COMMIT}"])
def test_the_hubs_files_come_from_one_commit_which_is_recorded(source: str, hub: Web, tmp_path: Path) -> None:
    folder = fetch(source, tmp_path / "weights")
    assert sorted(files_of(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]
    text = (folder / room.MANIFEST).read_text()
    assert json.loads(text)["arguments"] == {"source": source, "revision": COMMIT} and "s3cr3t" not in text
    fetched = [headers for (path, _, _), headers in zip(hub.asked, hub.headers) if "/resolve/" in path]
    assert {headers.get("Authorization") for headers in fetched} == {"Bearer hf_s3cr3t"}


def test_an_interrupted_try_goes_on_with_its_commit(hub: Web, tmp_path: Path) -> None:
    hub.spoil = lambda path, start: ("status", 403) if start >= 30_000 else None
    refused("hf:some/llama", tmp_path / "weights")
    for revision in ("", "/revision/main"):  # the repository moves on
        del hub.files[f"/api/models/some/llama{revision}"]
    hub.spoil, hub.asked = lambda path, start: None, []
    fetch("hf:some/llama", tmp_path / "weights")
    assert 0 not in hub.bytes_asked_from("model.safetensors")[1:]


def test_after_an_interruption_another_model_is_not_asked_for_at_the_first_ones_commit(
    hub: Web, tmp_path: Path
) -> None:
    other = "f" * 40
    hub.files["/api/models/other/llama"] = hub.files["/api/models/some/llama"].replace(COMMIT.encode(), other.encode())
    for path in [path for path in hub.files if path.startswith("/some/")]:
        hub.files[path.replace("/some/", "/other/").replace(COMMIT, other)] = hub.files[path]
    hub.spoil = lambda path, start: ("status", 403) if start >= 30_000 else None
    refused("hf:some/llama", tmp_path / "weights")
    hub.spoil = lambda path, start: None
    folder = fetch("hf:other/llama", tmp_path / "weights")
    assert room.read_manifest(folder)["arguments"] == {"source": "hf:other/llama", "revision": other}


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("token", [True, False])
def test_a_gated_model_is_a_report_that_says_what_to_do(
    status: int, token: bool, hub: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not token:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    hub.spoil = lambda path, start: ("status", status) if "/resolve/" in path else None
    problem = refused("hf:some/llama", tmp_path / "weights")
    assert f"answers {status}" in problem.seen and ("with the token" in problem.seen) == token
    assert "Accept the licence" in problem.advice and "HF_TOKEN" in problem.command


def test_a_model_that_the_hub_does_not_know_is_a_report(hub: Web, tmp_path: Path) -> None:
    assert "THE HUB REFUSES" in refused("hf:some/other", tmp_path / "weights").report()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_wrong_bytes_from_the_hub_are_found(name: str, hub: Web, tmp_path: Path) -> None:
    hub.spoil = lambda path, start: ("flip", 123) if path.endswith(name) else None
    assert f"{name} is not the file that was promised" in refused("hf:some/llama", tmp_path / "weights").title


# --- mirrors, folders, stores -----------------------------------------------------------------------------------------


def test_a_mirror_in_metas_form(web: Web, model: dict[str, bytes], tmp_path: Path) -> None:
    web.files.update({f"/mirror/llama/{name}": data for name, data in model.items()})
    assert files_of(fetch(f"{web.url}/mirror/llama/", tmp_path / "weights")) == model


@pytest.mark.parametrize("secret", ["http://us:s3cr3t@", "?token=s3cr3t", "http://us:p/s3cr3t@"])
def test_a_secret_in_source_is_refused_and_not_shown(secret: str, web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/m".replace("http://", secret) if "@" in secret else f"{web.url}/m{secret}"
    problem = refused(url, tmp_path / "weights")
    assert "SOURCE HOLDS A SECRET" in problem.report() and "MIRROR_URL_FILE" in problem.command and not web.asked


@pytest.mark.parametrize("how", ["MIRROR_URL", "MIRROR_URL_FILE"])
def test_a_mirrors_login_and_query_come_from_the_environment_and_stay_there(
    how: str, web: Web, model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.files.update({f"/m/{name}": data for name, data in model.items()})
    secret = web.url.replace("http://", "http://us:s3cr3t%40@") + "/m/?token=s3cr3t"
    (tmp_path / "link").write_text(secret + "\n")
    web.spoil = lambda path, start: None if web.asked[-1][2] else ("status", 401)
    problem = refused(f"{web.url}/m", tmp_path / "weights")
    assert (
        "checklist.chk was requested without a login" in problem.seen
        and "401" in problem.seen
        and "MIRROR_URL_FILE" in problem.command
    )
    web.asked, web.headers = [], []
    monkeypatch.setenv(how, str(tmp_path / "link") if how.endswith("FILE") else secret)
    folder = fetch(f"{web.url}/m", tmp_path / "weights")
    assert files_of(folder) == model
    assert {headers["authorization"] for headers in web.headers} == {"Basic " + b64encode(b"us:s3cr3t@").decode()}
    assert {query for _, _, query in web.asked} == {"token=s3cr3t"}
    assert not [path for path in folder.iterdir() if b"s3cr3t" in path.read_bytes()]
    problem = refused(f"{web.url}/other", tmp_path / "other")
    assert f"SOURCE is {web.url}/other, and it is for {web.url}/m" in problem.seen


def test_a_mirror_in_hugging_faces_form(web: Web, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors.index.json": index}
    files |= {"model-1.safetensors": os.urandom(25_000), "model-2.safetensors": b"x"}
    web.files.update({f"/m/{name}": data for name, data in files.items()})
    assert files_of(fetch(f"{web.url}/m", tmp_path / "weights")) == files
    web.files["/m/model.safetensors.index.json"] = b'{"weight_map": {"a": "../../x.safetensors"}}'
    assert "'../../x.safetensors'" in refused(f"{web.url}/m", tmp_path / "other").seen


def test_a_mounted_folder_is_copied_and_checked(model: dict[str, bytes], web: Web, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    for name, data in {**model, "cat.jpg": b"x", "optimizer.bin": b"x"}.items():
        (tmp_path / "mounted" / name).write_bytes(data)
    assert files_of(fetch(f"{tmp_path}/mounted", tmp_path / "weights")) == model
    (tmp_path / "mounted/params.json").write_bytes(b"{}")
    assert "md5 should be" in refused(f"{tmp_path}/mounted", tmp_path / "other").seen


class Bucket:
    """An object store with the folder `llama` of the bucket `bucket`."""

    def __init__(self, web: Web, files: dict[str, bytes]) -> None:
        self.web = web
        self.holds(files)

    def holds(self, files: dict[str, bytes]) -> None:
        entries = "".join(
            f"<Contents><Key>llama/{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{hashlib.md5(data).hexdigest()}&quot;</ETag>"
            f"<Size>{len(data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for name, data in files.items()
        )
        listing = f"<?xml version='1.0'?><ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        self.web.files["/bucket"] = listing.encode()
        self.web.files.update({f"/bucket/llama/{name}": data for name, data in files.items()})


@pytest.fixture
def bucket(web: Web, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in {
        "AWS_ENDPOINT_URL": web.url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "s3cr3t",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return Bucket(web, model)


def test_an_object_store_is_listed_and_read_by_ranges(
    web: Web, bucket: Bucket, model: dict[str, bytes], tmp_path: Path
) -> None:
    folder = fetch("s3://bucket/llama", tmp_path / "weights")
    assert files_of(folder) == model and "s3cr3t" not in (folder / room.MANIFEST).read_text()
    web.spoil = lambda path, start: ("status", 403)
    assert "THE STORE REFUSES" in refused("s3://bucket/llama", tmp_path / "other").report()


def test_a_key_that_no_file_can_have_is_named(bucket: Bucket, model: dict[str, bytes], tmp_path: Path) -> None:
    bucket.holds({**model, "../x": b"x"})
    problem = refused("s3://bucket/llama", tmp_path / "weights")
    assert '"llama/../x"' in problem.seen and "THE LIST OF FILES IS NOT" in problem.report()


# --- what changes at its source ---------------------------------------------------------------------------------------


OLD = {"config.json": b'{"a": 1}', "model.safetensors": b"old" * 30_000}


class Changing:
    """A model without digests in one of the places that may hold it; its fetching can be broken off in the middle."""

    def __init__(self, kind: str, web: Web, mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.web, self.mounted, self.patch = kind, web, mounted, monkeypatch
        self.source = {"mirror": f"{web.url}/m", "store": "s3://bucket/llama", "folder": str(mounted)}[kind]
        mounted.mkdir()
        self.holds(OLD)

    def holds(self, files: dict[str, bytes]) -> None:
        if self.kind == "mirror":
            self.web.files.update({f"/m/{name}": data for name, data in files.items()})
        if self.kind == "store":
            Bucket(self.web, files)
        for name, data in files.items() if self.kind == "folder" else ():
            (self.mounted / "new").write_bytes(data)
            os.replace(self.mounted / "new", self.mounted / name)

    def broken_off(self, output: Path) -> None:
        """Some segments arrive, others do not."""
        plain = fetch_weights.Fetch._take

        def take(fetching: fetch_weights.Fetch, arriving: fetch_weights.Arriving, start: int, end: int) -> None:
            if start >= 50_000:
                raise reports.fetching.fetch_refused(arriving.remote.name, self.source, 403)
            plain(fetching, arriving, start, end)

        with self.patch.context() as patch:
            patch.setattr(fetch_weights.Fetch, "_take", take)
            patch.setattr(fetch_weights, "CONNECTIONS", 1)
            refused(self.source, output)
        begun = json.loads((output.with_name(output.name + ".partial") / room.FINISHED).read_text())["begun"]
        assert sum(begun["model.safetensors.part"].values()) == 50_000


@pytest.fixture(params=["mirror", "store", "folder"])
def changing(
    request: pytest.FixtureRequest, web: Web, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Changing:
    return Changing(request.param, web, tmp_path / "mounted", monkeypatch)


def test_what_is_the_same_still_is_gone_on_with(
    changing: Changing, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changing.broken_off(tmp_path / "weights")
    assert files_of(fetch(changing.source + "/", tmp_path / "weights")) == OLD, "with a slash it is the same source"
    assert "in all 50.0 kB; kept" in capfd.readouterr().out


@pytest.mark.parametrize("size_bytes", [90_000, 40_000, 200_000], ids=["of the same size", "shorter", "longer"])
def test_two_versions_of_a_file_are_never_put_together(changing: Changing, size_bytes: int, tmp_path: Path) -> None:
    changing.broken_off(tmp_path / "weights")
    new = {**OLD, "model.safetensors": b"newer" * (size_bytes // 5)}
    changing.holds(new)
    assert files_of(fetch(changing.source, tmp_path / "weights")) == new


def test_a_file_that_is_replaced_while_it_arrives_is_a_report(
    changing: Changing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = {**OLD, "model.safetensors": b"new" * 30_000}
    plain = fetch_weights.Fetch._take

    def take(fetching: fetch_weights.Fetch, arriving: fetch_weights.Arriving, start: int, end: int) -> None:
        if start == 50_000:
            changing.holds(new)
        plain(fetching, arriving, start, end)

    with monkeypatch.context() as patch:
        patch.setattr(fetch_weights.Fetch, "_take", take)
        patch.setattr(fetch_weights, "CONNECTIONS", 1)
        problem = refused(changing.source, tmp_path / "weights")
    assert "MODEL.SAFETENSORS WAS REPLACED AT ITS SOURCE" in problem.report()
    assert files_of(fetch(changing.source, tmp_path / "weights")) == new


def test_where_nothing_tells_two_versions_apart_what_arrived_is_not_gone_on_with(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.tells_version = False
    changing = Changing("mirror", web, tmp_path / "mounted", monkeypatch)
    changing.broken_off(tmp_path / "weights")
    new = {**OLD, "model.safetensors": b"new" * 30_000}
    changing.holds(new)
    assert files_of(fetch(changing.source, tmp_path / "weights")) == new


def test_a_whole_file_in_place_of_a_part_without_its_version_is_not_taken_for_the_same(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing = Changing("mirror", web, tmp_path / "mounted", monkeypatch)
    changing.broken_off(tmp_path / "weights")

    def forgets(path: str, start: int) -> None:
        if start:
            web.ranges = web.tells_version = False

    web.spoil = forgets
    assert "the source now has one without a version" in refused(changing.source, tmp_path / "weights").seen


def test_a_part_that_was_made_shorter_meanwhile_is_fetched_anew(changing: Changing, tmp_path: Path) -> None:
    changing.broken_off(tmp_path / "weights")
    os.truncate(tmp_path / "weights.partial/model.safetensors.part", 20_000)
    assert files_of(fetch(changing.source, tmp_path / "weights")) == OLD


def test_files_of_a_mirror_that_is_being_updated_are_of_one_release(
    web: Web, model: dict[str, bytes], tmp_path: Path
) -> None:
    def release(number: int) -> dict[str, bytes]:
        files = {f"consolidated.0{shard}.pth": bytes([number, shard]) * 20_000 for shard in (0, 1)}
        files.update({"params.json": b'{"dim": %d}' % number, "tokenizer.model": b"%d" % number})
        listed = "".join(f"{hashlib.md5(data).hexdigest()}  {name}\n" for name, data in files.items())
        return {**files, "checklist.chk": listed.encode()}

    old, new = release(1), release(2)
    web.files.update({f"/m/{name}": data for name, data in old.items()})
    web.files["/m/consolidated.01.pth"] = new["consolidated.01.pth"]  # it is the first to be replaced
    assert "consolidated.01.pth" in refused(f"{web.url}/m", tmp_path / "weights").title
    assert (tmp_path / "weights.partial/consolidated.00.pth").is_file()
    web.files.update({f"/m/{name}": data for name, data in new.items()})
    assert files_of(fetch(f"{web.url}/m", tmp_path / "weights")) == new


# --- servers that answer something else -------------------------------------------------------------------------------


def test_other_bytes_than_those_asked_for_are_not_taken(web: Web, tmp_path: Path) -> None:
    web.files.update({f"/m/{name}": data for name, data in OLD.items()})
    web.spoil = lambda path, start: ("shifted", 0)
    assert "other bytes than those from" in refused(f"{web.url}/m", tmp_path / "weights").seen


@pytest.mark.parametrize("name", list(OLD))
def test_what_comes_packed_is_refused(name: str, web: Web, tmp_path: Path) -> None:
    web.files.update({f"/m/{name}": data for name, data in OLD.items()})
    web.spoil = lambda path, start: ("packed", 0) if path.endswith(name) else None
    problem = refused(f"{web.url}/m", tmp_path / "weights")
    assert "packed (gzip)" in problem.seen and name in problem.title


def test_an_empty_file_of_a_mirror_is_one(web: Web, tmp_path: Path) -> None:
    files = {**OLD, "added_tokens.json": b""}
    web.files.update({f"/m/{name}": data for name, data in files.items()})
    assert files_of(fetch(f"{web.url}/m", tmp_path / "weights")) == files


@pytest.mark.parametrize("name", ["manifest.json", "args", "finished.json", "consolidated.00.pth.part"])
def test_a_checklist_cannot_name_what_make_writes_itself(
    name: str, web: Web, model: dict[str, bytes], tmp_path: Path
) -> None:
    evil = model["checklist.chk"] + f"{hashlib.md5(b'evil').hexdigest()}  {name}\n".encode()
    files = {**model, "checklist.chk": evil, name: b"evil"}
    web.files.update({f"/m/{name}": data for name, data in files.items()})
    assert f"it names {name}; make itself" in refused(f"{web.url}/m", tmp_path / "weights").seen


# --- which files are a model ------------------------------------------------------------------------------------------


MISTRAL = {
    "config.json": b"{}",
    "model-1.safetensors": b"a",
    "model-2.safetensors": b"b",
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}',
    "params.json": b"{}",
    "consolidated.safetensors": b"ab",
    "tokenizer.model": b"t",
}
META = {"params.json": b"{}", "consolidated.00.pth": b"x", "tokenizer.model": b"t"}


@pytest.mark.parametrize(
    ("there", "form", "left"),
    [
        (MISTRAL, "hf", {"params.json", "consolidated.safetensors"}),
        (META, "meta", set()),
        ({**META, "config.json": b"{}", "model.safetensors": b"x"}, "meta", {"config.json", "model.safetensors"}),
        ({**META, "consolidated.safetensors": b"x"}, "meta", {"consolidated.safetensors"}),
    ],
    ids=["mistral's", "meta's", "meta's and hugging face's", "meta's and another"],
)
def test_whose_form_a_folder_has(there: dict[str, bytes], form: str, left: set[str], web: Web, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    for name, data in there.items():
        (tmp_path / "mounted" / name).write_bytes(data)
    folder = fetch(f"{tmp_path}/mounted", tmp_path / "weights")
    assert set(files_of(folder)) == set(there) - left
    assert form_of(folder) == form
    if "config.json" not in left:
        assert form_of(tmp_path / "mounted") == form


@pytest.mark.parametrize("names", [["params.json", "tokenizer.model"], ["config.json", "consolidated.safetensors"], []])
def test_a_folder_without_weights_is_refused(names: list[str], web: Web, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    for name in names:
        (tmp_path / "mounted" / name).write_bytes(b"{}")
    assert "no weights are there" in refused(f"{tmp_path}/mounted", tmp_path / "weights").seen


# --- several makes at once, and one name for one place ----------------------------------------------------------------


def test_another_make_that_fetched_it_meanwhile_is_enough(
    meta: Web, model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = meta_source.Meta.files
    asked: list[Any] = []

    def files(of: meta_source.Meta) -> list[source.Remote]:
        remotes = plain(of)
        if not asked:  # we are the second; the first fetches all between our first question and our lock
            asked.append(0)
            fetch("meta:llama-2-7b", tmp_path / "weights")
            asked.append(len(meta.asked))
        return remotes

    monkeypatch.setattr(meta_source.Meta, "files", files)
    monkeypatch.setenv("ROOM_NEEDS", "")  # as in the Makefile
    fetch("meta:llama-2-7b", tmp_path / "weights")
    assert len(meta.asked) == asked[1], "nothing was asked for a second time"
    assert files_of(tmp_path / "weights") == model and [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_what_another_make_fetched_from_elsewhere_meanwhile_is_not_replaced(
    meta: Web, model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta.files.update({f"/m/{name}": data for name, data in OLD.items()})
    plain = meta_source.Meta.files
    monkeypatch.setattr(
        meta_source.Meta, "files", lambda source: (fetch(f"{meta.url}/m", tmp_path / "weights"), plain(source))[1]
    )
    with pytest.raises(reports.Problem, match="have another source"):
        fetch("meta:llama-2-7b", tmp_path / "weights")
    assert files_of(tmp_path / "weights") == OLD


def test_a_whole_folder_that_was_killed_before_it_had_its_name_only_gets_it(
    meta: Web, model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*folders: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(room, "_publish", killed)
        fetch("meta:llama-2-7b", tmp_path / "weights")
    meta.asked = []
    monkeypatch.setenv("ROOM_NEEDS", "")
    assert files_of(fetch("meta:llama-2-7b", tmp_path / "weights")) == model
    assert set(meta.bytes_asked_from("consolidated.00.pth")) <= {0}, "how long it is, no more"


@pytest.mark.parametrize("again", ["./mounted", "mounted/", "./mounted//", ".//mounted"])
def test_one_folder_has_one_name(
    again: str, model: dict[str, bytes], web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounted").mkdir()
    for name, data in model.items():
        (tmp_path / "mounted" / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    fetch("./mounted", Path("weights"))
    with pytest.raises(reports.Finished, match="from ./mounted"):
        fetch_weights.fetch_weights(fetch_weights.Settings(again, Path("weights")))


@pytest.mark.parametrize("source", ["nonsense", "hf:", "hf:../x", "meta:", "meta:../x", "ftp:x"])
def test_a_source_that_is_none_is_a_report(source: str, web: Web, tmp_path: Path) -> None:
    assert "NOTHING TO FETCH" in refused(source, tmp_path / "weights").report()


# --- typed ------------------------------------------------------------------------------------------------------------


def test_make_fetches_what_is_missing_converts_it_and_clean_leaves_it(
    own_tree: Path, model: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "mounted").mkdir()
    for name, data in model.items():
        (tmp_path / "mounted" / name).write_bytes(data)
    words = ("MODEL=weights/mine", f"SOURCE={tmp_path}/mounted")
    done = make(own_tree, "checkpoint", *words)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if re.match(r"\w+ +-> ", line)] == [
        "weights",
        "config",
        "checkpoint",
    ]
    assert make(own_tree, "-q", "checkpoint", *words).returncode == 0
    assert make(own_tree, "-q", "checkpoint", words[0]).returncode == 0
    assert "whole already" in make(own_tree, "weights", *words).stdout
    assert make(own_tree, "fsck", *words).returncode == 0
    make(own_tree, "clean")
    assert (own_tree / "weights/mine/consolidated.00.pth").is_file() and not list(own_tree.glob("build/*"))


def test_a_secret_behind_make_is_refused_and_not_repeated(own_tree: Path) -> None:
    for name in ("META_URL", "MIRROR_URL", "HF_TOKEN"):
        done = make(own_tree, "weights", "MODEL=llama-2-7b", f"{name}=https://x/*?s3cr3t")
        assert done.returncode == 2 and f"{name} IS A SECRET" in done.stderr
        assert "s3cr3t" not in done.stdout + done.stderr


@pytest.mark.parametrize("source", ["http://us:s3cr3t@127.0.0.1:9/m", "http://127.0.0.1:9/m?token=s3cr3t"])
def test_a_secret_in_a_source_typed_behind_make_is_not_repeated(own_tree: Path, source: str) -> None:
    for goal in ("weights", "plan"):
        done = make(own_tree, goal, "MODEL=weights/mine", f"SOURCE={source}")
        assert done.returncode == 2 and "SOURCE HOLDS A SECRET" in done.stderr and "MIRROR_URL_FILE" in done.stderr
        assert "s3cr3t" not in done.stdout + done.stderr


def test_a_preset_without_its_weights_says_how_to_get_them(own_tree: Path) -> None:
    done = make(own_tree, "weights", "MODEL=llama-2-7b", META_URL="", META_URL_FILE="")
    assert done.returncode == 2 and "NO URL FROM META" in done.stderr
    assert "NOTHING TO FETCH" in make(own_tree, "weights", "MODEL=stories").stderr
