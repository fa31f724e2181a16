"""make weights against a real server on loopback that breaks connections, expires links, serves wrong bytes and ignores ranges."""

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
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from conftest import ROOT, make
from synthetic import write_model

from scripts import errors, fetch_weights, room, sources

SEGMENT = 10_000
SECRET = "Policy=abc&Signature=s3cr3t~x__&Key-Pair-Id=K1"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Web:
    """A server of files. Each request may be spoilt: spoil(path, start) says with what."""

    def __init__(self) -> None:
        self.files: Dict[str, bytes] = {}
        self.ranges = True
        self.spoil: Callable[[str, int], Optional[Tuple[str, int]]] = lambda path, start: None
        self.asked: List[Tuple[str, int, str]] = []  # path, first byte, query
        self.headers: List[Dict[str, str]] = []
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
                    data = bytearray(data)
                    data[spoilt[1]] ^= 1
                if not web.ranges or found is None:
                    return self.answer(200, bytes(data), spoilt)
                if start >= len(data):
                    return self.answer(416, b"", total=len(data))
                end = min(int(found[2]) + 1 if found[2] else len(data), len(data))
                return self.answer(206, bytes(data[start:end]), spoilt, start, len(data))

            def answer(self, status: int, body: bytes, spoilt: Any = None, start: int = 0, total: int = 0) -> None:
                self.send_response(status)
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

    def bytes_asked_from(self, name: str) -> List[int]:
        return [start for path, start, _ in self.asked if path.endswith(name)]

    def end(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(fetch_weights, "SEGMENT_BYTES", SEGMENT)
    monkeypatch.setattr(fetch_weights, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)
    for name in ("META_URL", "META_URL_FILE", "HF_TOKEN", "ROOM_ARGS", "ROOM_NEEDS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Web()
    yield server
    server.end()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, bytes]:
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
def meta(web: Web, model: Dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Web:
    """The model as Meta's server has it, and a link to it in META_URL."""
    for name, data in model.items():
        web.files["/" + ("" if name.startswith("tokenizer") else "llama-2-7b/") + name] = data
    monkeypatch.setenv("META_URL", f"{web.url}/*?{SECRET}")
    return web


def fetch(source: str, output: Path) -> Path:
    try:
        fetch_weights.fetch_weights(fetch_weights.Settings(source, output))
    except errors.Finished:
        pass
    return output


def refused(source: str, output: Path) -> errors.Problem:
    with pytest.raises(errors.Problem) as caught:
        fetch(source, output)
    report = caught.value.report()
    assert not output.exists() and report.splitlines()[-1].startswith("    ")
    assert "s3cr3t" not in report and "s3cr3t" not in str(caught.value.as_json())
    return caught.value


def files_of(folder: Path) -> Dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in ("args", "args.sha256", room.MANIFEST)
    }


# --- Meta ------------------------------------------------------------------------------------------------------------------


def test_metas_download_arrives_whole_and_its_manifest_knows_every_file_and_no_secret(
    meta: Web, model: Dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
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


def test_connections_that_break_all_the_time_lose_nothing(meta: Web, model: Dict[str, bytes], tmp_path: Path) -> None:
    chance = random.Random(0)
    meta.spoil = lambda path, start: (
        ("cut", chance.randrange(1, 4000)) if chance.random() < 0.5 and "pth" in path else None
    )
    assert files_of(fetch("meta:llama-2-7b", tmp_path / "weights")) == model


def test_after_an_expired_link_only_what_is_missing_is_asked_for(
    meta: Web, model: Dict[str, bytes], tmp_path: Path
) -> None:
    meta.spoil = lambda path, start: ("status", 403) if start >= 150_000 and "01.pth" in path else None
    problem = refused("meta:llama-2-7b", tmp_path / "weights")
    assert "403" in problem.seen and "META_URL_FILE" in problem.command and "What arrived is kept" in problem.advice
    kept = json.loads((tmp_path / "weights.partial" / room.FINISHED).read_text())["begun"]
    here = {int(start) for start, size in kept["consolidated.01.pth.part"].items() if size == SEGMENT}
    assert here  # how many of the 15 segments before it had come in when the link expired is the network's to say
    meta.spoil, meta.asked = lambda path, start: None, []
    assert files_of(fetch("meta:llama-2-7b", tmp_path / "weights")) == model
    again = meta.bytes_asked_from("01.pth")[1:]  # the first asks how long the file is
    segments = len(model["consolidated.01.pth"]) // SEGMENT + 1
    assert not here & set(again) and len(here) + len(again) <= segments


def test_after_kill_9_the_same_command_goes_on(meta: Web, model: Dict[str, bytes], tmp_path: Path) -> None:
    arrived = threading.Event()

    def slow(path: str, start: int) -> None:
        if start >= 200_000 and "00.pth" in path:
            arrived.set()
            killed.wait(60)

    killed = threading.Event()
    meta.spoil = slow  # type: ignore[assignment]
    code = "from scripts import errors, fetch_weights as f\nf.SEGMENT_BYTES = 10_000\nf.CONNECTIONS = 1\nerrors.run(f.main)"
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
    meta: Web, model: Dict[str, bytes], tmp_path: Path
) -> None:
    meta.ranges = False
    broken = []

    def once(path: str, start: int) -> Optional[Tuple[str, int]]:
        if "00.pth" in path and len(broken) < 3:
            broken.append(path)
            return ("cut", 50_000)
        return None

    meta.spoil = once
    assert files_of(fetch("meta:llama-2-7b", tmp_path / "weights")) == model


def test_a_wrong_byte_is_found_named_and_fetched_again(meta: Web, model: Dict[str, bytes], tmp_path: Path) -> None:
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
        (lambda path, start: ("status", 404) if "params" in path else None, "404: it is not there"),
        (lambda path, start: ("status", 500) if "01.pth" in path else None, "the server answers 500"),
        (lambda path, start: ("cut", 0) if "01.pth" in path and start else None, "tried several times"),
    ],
    ids=["expired", "missing", "server error", "no connection holds"],
)
def test_what_the_server_does_not_give_is_a_report(spoil: Any, says: str, meta: Web, tmp_path: Path) -> None:
    meta.spoil = spoil
    assert says in refused("meta:llama-2-7b", tmp_path / "weights").seen


def test_an_error_page_is_no_checklist(meta: Web, tmp_path: Path) -> None:
    meta.files["/llama-2-7b/checklist.chk"] = b"<html>Access Denied</html>"
    assert "no list of md5 sums" in refused("meta:llama-2-7b", tmp_path / "weights").seen
    meta.files["/llama-2-7b/checklist.chk"] = b"d41d8cd98f00b204e9800998ecf8427e  ../../etc/passwd\n"
    assert "no list of md5 sums" in refused("meta:llama-2-7b", tmp_path / "weights").seen


def test_a_full_disk_is_told_before_anything_is_fetched(
    meta: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(500_000))
    problem = refused("meta:llama-2-7b", tmp_path / "weights")
    assert "THE DISK IS TOO SMALL" in problem.report() and "Nothing was fetched" in problem.seen
    assert max(len(set(meta.bytes_asked_from(name))) for name in ("00.pth", "01.pth")) == 1


@pytest.mark.parametrize(
    "url", ["", "https://host/without-a-star?Policy=s3cr3t", "Policy=s3cr3t", "ftp://host/*?s3cr3t"]
)
def test_what_is_no_link_of_metas_is_told_and_not_shown(
    url: str, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("META_URL", url)
    assert "NO URL OF META" in refused("meta:llama-2-7b", tmp_path / "weights").report()


def test_a_folder_that_make_did_not_fetch_is_not_touched(meta: Web, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/mine").write_text("")
    with pytest.raises(errors.Problem, match="not ours"):
        fetch("meta:llama-2-7b", tmp_path / "weights")
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["mine"]


# --- the hub ---------------------------------------------------------------------------------------------------------------


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
    assert "THE HUB DOES NOT GIVE" in refused("hf:some/other", tmp_path / "weights").report()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_wrong_bytes_from_the_hub_are_found(name: str, hub: Web, tmp_path: Path) -> None:
    hub.spoil = lambda path, start: ("flip", 123) if path.endswith(name) else None
    assert f"{name} is not the file that was promised" in refused("hf:some/llama", tmp_path / "weights").title


# --- mirrors, folders, stores ------------------------------------------------------------------------------------------------


def test_a_mirror_in_metas_form(web: Web, model: Dict[str, bytes], tmp_path: Path) -> None:
    web.files.update({f"/mirror/llama/{name}": data for name, data in model.items()})
    url = web.url.replace("http://", "http://user:s3cr3t@") + "/mirror/llama/?token=s3cr3t"
    folder = fetch(url, tmp_path / "weights")
    assert files_of(folder) == model
    assert "s3cr3t" not in (folder / room.MANIFEST).read_text()


def test_a_mirror_in_hugging_faces_form(web: Web, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors.index.json": index}
    files |= {"model-1.safetensors": os.urandom(25_000), "model-2.safetensors": b"x"}
    web.files.update({f"/m/{name}": data for name, data in files.items()})
    assert files_of(fetch(f"{web.url}/m", tmp_path / "weights")) == files
    web.files["/m/model.safetensors.index.json"] = b'{"weight_map": {"a": "../../x.safetensors"}}'
    assert "'../../x.safetensors'" in refused(f"{web.url}/m", tmp_path / "other").seen


def test_a_mounted_folder_is_copied_and_checked(model: Dict[str, bytes], web: Web, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    for name, data in {**model, "cat.jpg": b"x", "optimizer.bin": b"x"}.items():
        (tmp_path / "mounted" / name).write_bytes(data)
    assert files_of(fetch(f"{tmp_path}/mounted", tmp_path / "weights")) == model
    (tmp_path / "mounted/params.json").write_bytes(b"{}")
    assert "md5 should be" in refused(f"{tmp_path}/mounted", tmp_path / "other").seen


def test_an_object_store_is_listed_and_read_by_ranges(
    web: Web, model: Dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = "".join(
        f"<Contents><Key>llama/{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;{i}&quot;</ETag>"
        f"<Size>{len(data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for i, (name, data) in enumerate(model.items())
    )
    listing = f"<?xml version='1.0'?><ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
    web.files["/bucket"] = listing.encode()
    web.files.update({f"/bucket/llama/{name}": data for name, data in model.items()})
    for name, value in {
        "AWS_ENDPOINT_URL": web.url, "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "s3cr3t",
        "AWS_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    folder = fetch("s3://bucket/llama", tmp_path / "weights")
    assert files_of(folder) == model and "s3cr3t" not in (folder / room.MANIFEST).read_text()
    web.spoil = lambda path, start: ("status", 403)
    assert "THE STORE DOES NOT GIVE" in refused("s3://bucket/llama", tmp_path / "other").report()


@pytest.mark.parametrize("source", ["nonsense", "hf:", "hf:../x", "meta:", "meta:../x", "ftp:x"])
def test_a_source_that_is_none_is_a_report(source: str, web: Web, tmp_path: Path) -> None:
    assert "NOTHING TO FETCH" in refused(source, tmp_path / "weights").report()


# --- typed --------------------------------------------------------------------------------------------------------------------


def test_make_fetches_what_is_missing_converts_it_and_clean_leaves_it(
    own_tree: Path, model: Dict[str, bytes], tmp_path: Path
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
    for name in ("META_URL", "HF_TOKEN"):
        done = make(own_tree, "weights", "MODEL=llama-2-7b", f"{name}=https://x/*?s3cr3t")
        assert done.returncode == 2 and f"{name} IS A SECRET" in done.stderr
        assert "s3cr3t" not in done.stdout + done.stderr


def test_a_preset_without_its_weights_says_how_to_get_them(own_tree: Path) -> None:
    done = make(own_tree, "weights", "MODEL=llama-2-7b", META_URL="", META_URL_FILE="")
    assert done.returncode == 2 and "NO URL OF META" in done.stderr
    assert "NOTHING TO FETCH" in make(own_tree, "weights", "MODEL=stories").stderr
