"""The ingredients of a room: when the code of a module changes, exactly the rooms that used it are made again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import ROOT, copy_of_project, make

from scripts.images import launcher
from scripts.making import ingredients

PLACES = {
    "config": "build/stories/config",
    "hf": "build/stories/hf",
    **{
        room: f"build/stories/torch-0.8.0-tp2-float16/{room}"
        for room in ("checkpoint", "engines", "verified", "model_repo")
    },
}
EDIT = b"\nEDITED = 1\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with every room that needs neither docker nor network."""
    tree = copy_of_project(tmp_path_factory.mktemp("made") / "tree")
    done = make(tree, "model_repo", "verified", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ingredients, "ROOT", made)
    return made


def record(tree: Path, room: str) -> dict[str, str]:
    return dict(json.loads((tree / PLACES[room] / ingredients.RECORD).read_bytes()))


def stale(tree: Path) -> list[str]:
    return [room for room, place in PLACES.items() if ingredients.stale(tree / place)]


def loaded_by(tree: Path, room: str) -> set[str]:
    """The project's modules that Python itself says it loads for a room's script, and for what the room starts."""
    started = {"verified": ["scripts.verifying.sides"]}.get(room, [])
    found: set[str] = set()
    for module in [f"scripts.build_{room}", *started]:
        command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
        said = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True, timeout=120).stderr
        names = re.findall(r"^import time:.*\| +(scripts[\w.]*)$", said, re.MULTILINE)
        found |= {f"{name.replace('.', '/')}.py" for name in names}
    return {path for path in found if (tree / path).is_file() and ingredients.is_ingredient(path)}


def modules(tree: Path) -> Iterator[Path]:
    yield from sorted([*tree.glob("scripts/**/*.py"), *tree.glob("model_repo_template/*/1/*.py")])


@pytest.mark.timeout(600)
def test_every_module_makes_exactly_the_rooms_again_that_used_it(here: Path) -> None:
    assert stale(here) == []
    used = {room: loaded_by(here, room) for room in PLACES}
    for room, paths in used.items():
        assert {path for path in record(here, room) if path.startswith("scripts/")} == paths, room
    engine = "model_repo_template/tensorrt_llm/1/"
    for path in modules(here):
        name, source = path.relative_to(here).as_posix(), path.read_bytes()
        expected = [room for room, paths in used.items() if name in paths]
        if name.startswith("model_repo_template/"):
            expected = ["verified"] * (name.startswith(engine) and name in record(here, "verified")) + ["model_repo"]
        try:
            path.write_bytes(source + EDIT)
            assert stale(here) == expected, name
        finally:
            path.write_bytes(source)
    assert stale(here) == []


def test_the_gate_knows_the_engine_that_it_asked(here: Path) -> None:
    names = {"llama", "step", "sampling", "engine_config"}
    assert {f"model_repo_template/tensorrt_llm/1/{name}.py" for name in names} & set(record(here, "verified"))


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("scripts/nvidia/trtllm_build.py", b"# ", b"# another word: "),
        ("scripts/weights/safetensors.py", b'"""', b'"""Another word. '),
        ("scripts/serve.py", b"ready", b"able"),
        ("scripts/reports/checkpoint.py", b"cannot", b"can not"),
        ("scripts/build_checkpoint.py", b"was finished before", b"was made before"),
    ],
    ids=["comment", "docstring", "serve", "report", "progress line"],
)
def test_rewording_costs_no_room(here: Path, path: str, old: bytes, new: bytes) -> None:
    source = (here / path).read_bytes()
    try:
        (here / path).write_bytes(source.replace(old, new, 1))
        assert stale(here) == []
    finally:
        (here / path).write_bytes(source)


@pytest.mark.parametrize(
    ("path", "rooms"),
    [
        ("docker/contracts/checkpoint-config/v0.8.0.json", ["checkpoint"]),
        ("docker/contracts/checkpoint-config/v0.14.0.json", []),
        ("docker/contracts/engine-config/v0.8.0.json", ["engines"]),
        ("docker/contracts/backend/v0.8.0.json", ["model_repo"]),
        ("docker/contracts/backend-rules/rules.json", ["model_repo"]),
        ("model_repo_template/ensemble/config.pbtxt", ["model_repo"]),
        ("models/prompts.txt", ["verified"]),
        ("docker/gpus.json", []),
    ],
)
def test_a_table_makes_the_rooms_again_that_read_it(here: Path, path: str, rooms: list[str]) -> None:
    source = (here / path).read_bytes()
    try:
        (here / path).write_bytes(source + b"\n")
        assert stale(here) == rooms
        (here / path).unlink()
        assert stale(here) == rooms
    finally:
        (here / path).write_bytes(source)


def test_a_row_of_a_table_concerns_those_who_use_that_version(here: Path) -> None:
    table = here / "docker/toolchains.json"
    source = table.read_text()
    rows = json.loads(source)
    try:
        for version, expected in (
            (list(rows)[0], ["checkpoint", "engines", "verified", "model_repo"]),
            (list(rows)[1], []),
        ):
            table.write_text(json.dumps({**rows, version: {**rows[version], "digest": "sha256:" + "0" * 64}}))
            assert set(stale(here)) <= set(expected) and ("checkpoint" in stale(here)) == bool(expected), version
    finally:
        table.write_text(source)


def test_a_room_that_does_not_say_what_it_was_made_from_is_made_again(made: Path, tmp_path: Path) -> None:
    room = tmp_path / "config"
    shutil.copytree(made / PLACES["config"], room)
    assert not ingredients.stale(room)
    (room / ingredients.RECORD).write_text("{")
    assert ingredients.stale(room)
    (room / ingredients.RECORD).unlink()
    assert ingredients.stale(room)


def test_records_hold_no_path_of_this_machine_and_are_the_same_for_everyone(made: Path) -> None:
    for room, place in PLACES.items():
        text = (made / place / ingredients.RECORD).read_text()
        assert str(made) not in text and "/tmp" not in text and str(ROOT) not in text, room
        assert all(re.fullmatch(r"[\w.*#/-]+", name) and not name.startswith("/") for name in json.loads(text))
        manifest = json.loads((made / place / "manifest.json").read_bytes())
        assert ingredients.RECORD not in manifest["files"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b"x = 1  # why\n", b"x = 1\n"),
        (b'def f():\n    """Doc.\n\n    More."""\n    return 1\n', b"def f():\n    return 1\n"),
        (b'say("a", f"{x} # b")\nx = "# no"\n', b'x = "# no"\n'),
        (b"room.say(\n    'a',\n    'b',\n)\n\n\n# c\ny = 2\n", b"y = 2\n"),
    ],
)
def test_what_has_no_meaning(one: bytes, other: bytes) -> None:
    assert ingredients.meaning(one) == ingredients.meaning(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b"x = 1\n", b"x = 2\n"),
        (b'x = """a\n# b\n"""\n', b'x = """a\n"""\n'),
        (b"x = '#a'\n", b"x = '#b'\n"),
        (b"x = [\n    '# a',\n]\n", b"x = [\n    '# b',\n]\n"),
        ("x = 'é'  # é\ny = 'è'\n".encode(), "x = 'é'  # é\ny = 'é'\n".encode()),
        (b"if x:\n    y()\n", b"if x:\n  pass\ny()\n"),
    ],
)
def test_what_has_meaning(one: bytes, other: bytes) -> None:
    assert ingredients.meaning(one) != ingredients.meaning(other)


def test_an_image_holds_what_its_launcher_loads_and_starts() -> None:
    """Held against Python's own word: each program of the launcher runs with nothing but the image's files."""
    files = launcher.files()
    assert files == list(dict.fromkeys(files)) and all((ROOT / file).is_file() for file in files)
    programs = [
        file for file in files if file.endswith(".py") and '__name__ == "__main__"' in (ROOT / file).read_text()
    ]
    assert {"scripts/images/entry.py", "scripts/serving/processes.py", "scripts/openai/__main__.py"} <= set(programs)
    assert not [file for file in files if file.startswith(("scripts/build_", "scripts/weights/", "scripts/bench/"))]
    used = ingredients.used()  # an image holds their words too: every byte makes it again
    assert all(used[file].startswith("bytes ") for file in files)


@pytest.mark.parametrize("module", ["scripts.images.entry", "scripts.openai.__main__", "scripts.serving.all_reduce"])
def test_the_images_files_are_enough(module: str, tmp_path: Path) -> None:
    for file in launcher.files():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, tmp_path / file)
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
