"""The Makefile: what is made again after which change, what it refuses, and what is left after kill -9,
a full disk or two makes."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import hashlib
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from project import ROOT, copy_of_project, make, start

from scripts.making import choice, journey

ROOMS = ["config", "checkpoint", "engines", "model_repo"]
CONFIG, HF = Path("build/stories/config"), Path("build/stories/hf")
VARIANT = Path("build/stories/torch-0.8.0-tp2-float16")
PLACES = {"config": CONFIG, **{room: VARIANT / room for room in ROOMS[1:]}}


def asked_for(tree: Path, *words: str) -> list[str]:
    """The rooms that make would fill, by what `make -n` prints."""
    done = make(tree, "-n", "model_repo", *words)
    assert done.returncode == 0, done.stderr
    return re.findall(r"-m scripts\.build_(\w+)", done.stdout)


def filled(output: str) -> list[str]:
    """The rooms that were filled, by the lines they print."""
    return re.findall(r"^(\w+) +-> build/.* files, ", output, re.MULTILINE)


def edit(path: Path) -> None:
    """Another code, so that rooms are made again; the same rooms."""
    with path.open("a") as file:
        file.write("EDITED = 1\n")


def files_below(folder: Path, ignored: tuple[str, ...] = ("args", "args.sha256", "made_from.json")) -> dict[str, bytes]:
    """Every file but the question that was asked (it may hold a path)."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ignored
    }


def stats_below(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with every room up to model_repo made. Not to be changed."""
    tree = copy_of_project(tmp_path_factory.mktemp("made") / "tree")
    done = make(tree, "model_repo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (filled(done.stdout), done.stderr) == (ROOMS, "")
    return tree


@pytest.fixture
def made_tree(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` that a test may change. It keeps the files' times, so that make has nothing to do there."""
    shutil.copytree(made, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


@pytest.fixture
def own_tree(made: Path, tmp_path: Path) -> Path:
    """The sources of `made`, nothing made: the checkout may change while the tests run."""
    shutil.copytree(made, tmp_path / "tree", symlinks=True, ignore=shutil.ignore_patterns("build", "__pycache__"))
    return tmp_path / "tree"


# --- what is made again -----------------------------------------------------------------------------------------------


def test_nothing_is_made_again_and_nothing_is_opened_for_writing(made_tree: Path) -> None:
    before = stats_below(made_tree)
    read_only = subprocess.run(
        ["mount", "--bind", "-o", "ro", made_tree / "build", made_tree / "build"], capture_output=True, check=False
    )
    try:
        for _ in range(2):
            done = make(made_tree, "model_repo", PYTHONDONTWRITEBYTECODE="1")
            assert (done.returncode, done.stderr) == (0, "")
            assert filled(done.stdout) == []
        assert make(made_tree, "-q", "model_repo").returncode == 0
    finally:
        if read_only.returncode == 0:
            subprocess.run(["umount", made_tree / "build"], check=True)
    assert stats_below(made_tree) == before


# every module and table: tests/making/test_ingredients.py
EDITED = [
    ("scripts/build_config.py", "X = 1", ROOMS),
    ("scripts/weights/cast.py", "X = 1", ROOMS[1:]),
    ("scripts/weights/cast.py", "# X", []),
    ("models/stories/tokenizer.model", "", ROOMS),
    ("requirements/run.txt", "", []),
    ("scripts/serve.py", "X = 1", []),
    ("Makefile", "# X", []),
]


@pytest.mark.parametrize(("path", "line", "expected"), EDITED, ids=[f"{path} {line}" for path, line, _ in EDITED])
def test_an_edited_file_costs_exactly_the_rooms_made_from_it(
    made: Path, path: str, line: str, expected: list[str]
) -> None:
    source, stat = (made / path).read_bytes(), (made / path).stat()
    if line:
        (made / path).write_bytes(source + f"{line}\n".encode())
    else:
        os.utime(made / path)
    try:
        assert asked_for(made) == expected
    finally:
        (made / path).write_bytes(source)
        os.utime(made / path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert asked_for(made) == []


def test_another_engine_has_rooms_of_its_own_but_the_same_config(made: Path) -> None:
    assert asked_for(made, "ENGINE=tensorrt", "TOOLCHAIN=0.8.0") == ROOMS[1:]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("CONTEXT=256", ROOMS),
        ("TP=4", ROOMS[1:]),
        ("DTYPE=float32", ROOMS[1:]),
        ("DTYPE=", ROOMS[1:]),
        ("TOOLCHAIN=0.14.0", ROOMS[1:]),
        ("MAX_BATCH_SIZE=4", ROOMS[2:]),
        ("MAX_INPUT_LEN=100", ROOMS[2:]),
        ("MAX_SEQ_LEN=384", ROOMS[2:]),
        ("MAX_NUM_TOKENS=512", ROOMS[2:]),
        ("STREAMING=off", ["model_repo"]),
        ("HTTP_PORT=9999", []),
        ("HOST=::1", []),
        ('PROMPT=it\'s "a" $(b) #c', []),
        ("MAX_TOKENS=7", []),
    ],
)
def test_a_changed_setting_costs_exactly_the_rooms_that_depend_on_it(
    made: Path, setting: str, expected: list[str]
) -> None:
    assert asked_for(made, setting) == expected


@pytest.mark.parametrize(
    ("lock", "expected"), [("run.txt", ROOMS[1:]), ("torch.txt", ROOMS[1:]), ("test.txt", []), ("dev.txt", [])]
)
def test_a_changed_lock_of_the_run_time_costs_all_rooms_but_config(
    made_tree: Path, lock: str, expected: list[str]
) -> None:
    with (made_tree / "requirements" / lock).open("a") as file:
        file.write("# another package\n")
    assert asked_for(made_tree) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "params.json").write_text("{}"), ROOMS),
        (lambda folder: (folder / "consolidated.01.pth").write_bytes(b""), ROOMS),
        (lambda folder: (folder / "ABOUT.md").unlink(), ROOMS),
        (lambda folder: (folder.parent / "tokenizer.model").write_bytes(b""), ROOMS),
        (lambda folder: (folder / ".DS_Store").write_bytes(b""), []),
        (lambda folder: (folder / "logs").mkdir(), []),
    ],
    ids=["content", "added", "removed", "tokenizer one level up", "hidden", "folder"],
)
def test_weights_are_watched_by_names_sizes_and_times(
    made_tree: Path, change: Callable[[Path], Any], expected: list[str]
) -> None:
    change(made_tree / "models/stories")
    assert asked_for(made_tree) == expected


def test_a_template_that_was_taken_away_is_noticed(made_tree: Path) -> None:
    (made_tree / "model_repo_template/postprocessing/1/model.py").unlink()
    assert asked_for(made_tree) == ["model_repo"]


def test_there_and_back_again_costs_only_what_was_changed(made_tree: Path) -> None:
    before, rooms = stats_below(made_tree / CONFIG), files_below(made_tree / "build")
    for words in (["MAX_SEQ_LEN=384"], []):
        done = make(made_tree, "model_repo", *words)
        assert (done.returncode, filled(done.stdout)) == (0, ["engines", "model_repo"]), done.stderr
    assert files_below(made_tree / "build") == rooms
    done = make(made_tree, "model_repo", "TP=1")
    assert (done.returncode, filled(done.stdout)) == (0, ["checkpoint", "engines", "model_repo"]), done.stderr
    assert asked_for(made_tree) == []
    assert stats_below(made_tree / CONFIG) == before


def test_the_environment_never_decides(made: Path, tmp_path: Path) -> None:
    (tmp_path / "models/stories").mkdir(parents=True)
    environment: dict[str, Any] = {
        "MODEL": "nonsense", "TP": "4", "ENGINE": "x", "DTYPE": "float32", "TOOLCHAIN": "1.2.1", "WEIGHTS": "/nowhere", "CONTEXT": "1",
        "MAX_SEQ_LEN": "9", "ROOM_ARGS": "x", "ROOM_NEEDS": "x", "LOCK": "x", "CDPATH": str(tmp_path), "LC_ALL": "C", "PYTHONPATH": "/x",
        "PYTHONSAFEPATH": "1", "REFUSED": "MODEL", "NAME": "x", "HF": "x",
    }  # fmt: skip
    done = make(made, "-q", "model_repo", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    done = make(made, "-B", "config", "-n", **environment)
    assert "--weights models/stories --max-position-embeddings=512" in done.stdout


def test_two_trees_give_the_same_rooms(made: Path, own_tree: Path) -> None:
    done = make(own_tree, "-j4", "model_repo", LC_ALL="C", TZ="Asia/Seoul")
    assert (done.returncode, filled(done.stdout)) == (0, ROOMS), done.stderr
    assert files_below(own_tree / "build") == files_below(made / "build")
    names = [
        str(own_tree).encode(),
        own_tree.parent.name.encode(),
        socket.gethostname().encode(),
        f"/home/{getpass.getuser()}".encode(),
    ]
    for path, content in files_below(own_tree / "build", ignored=()).items():
        assert not [name for name in names if name in content], path


# --- what does not build ----------------------------------------------------------------------------------------------


def test_make_alone_prints_the_help_page_in_the_order_of_the_journey(own_tree: Path) -> None:
    done = make(own_tree)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == make(own_tree, "help").stdout
    words = re.findall(r"^  ([a-z_-]+) +\S", done.stdout, re.MULTILINE)
    assert [word for word in words if word in {*ROOMS, "hf", "verified", "serve", "ask", "demo"}] == [
        "config", "hf", "checkpoint", "engines", "verified", "model_repo", "serve", "ask", "demo",
    ]  # fmt: skip
    assert {"help", "doctor", "test", "lint", "clean"} <= set(words)


@pytest.mark.parametrize(
    "words", [["-n", "demo"], ["-q", "model_repo"], ["help"], ["clean"], ["doctor"], ["-n", "test"]], ids=" ".join
)
def test_looking_writes_nothing(own_tree: Path, words: list[str]) -> None:
    before = set(own_tree.rglob("*"))
    command = ["make", *words]  # without PYTHON: no packages are installed either
    subprocess.run(
        command,
        cwd=own_tree,
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert set(own_tree.rglob("*")) == before


def test_a_preset_can_be_looked_at_before_its_weights_are_there(own_tree: Path) -> None:
    done = make(own_tree, "-n", "serve", "MODEL=llama-2-70b", "PYTHON=")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--tp-size 8" in done.stdout


def test_clean_takes_the_rooms_and_nothing_else(made_tree: Path) -> None:
    (made_tree / "weights").mkdir()
    (made_tree / "weights/fetched").write_bytes(b"")
    assert make(made_tree, "clean").returncode == 0
    assert not list(made_tree.glob("build/*"))
    assert (made_tree / "weights/fetched").exists() and (made_tree / "models/stories/params.json").exists()


# --- settings that cannot be right ------------------------------------------------------------------------------------


def the_report(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """(title, command) of the one report on stderr; everything else there is make's own last line."""
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr and "warning" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[0].startswith("-- ") and re.match(r"make: \*\*\*|Makefile:\d+: \*\*\* Nothing was made", lines[-1]), (
        done.stderr
    )
    assert sum(line.startswith("-- ") for line in lines) == 1
    assert lines[-2].startswith("    "), done.stderr
    return lines[0], lines[-2].strip()


# every value of every setting: tests/test_settings.py
@pytest.mark.parametrize(
    ("words", "titles"),
    [
        (
            ["TP=$(shell touch pwned)", "DTYPE=fp16", "LICENSE=x&y"],
            ["TP is '$(shell touch pwned)'", "DTYPE is 'fp16'", "'x&y'"],
        ),
        (["MODEL=/a b'c"], ["MODEL IS A PATH"]),
        (["MODLE=stories"], ["NO SETTING NAMED MODLE"]),
    ],
    ids=["values", "a path", "a name"],
)
def test_a_wrong_setting_is_a_report_before_anything_is_done(
    own_tree: Path, words: list[str], titles: list[str]
) -> None:
    before = set(own_tree.rglob("*"))
    done = make(own_tree, "model_repo", *words)
    _, command = the_report(done)
    assert all(title in done.stderr for title in titles), done.stderr
    assert re.match(r"make model_repo |ln -sfn .* && make model_repo ", command), command
    assert done.stdout == ""
    assert set(own_tree.rglob("*")) == before


def test_an_unknown_word_is_a_report_with_the_nearest_one(own_tree: Path) -> None:
    head, command = the_report(make(own_tree, "srve", "TP=4"))
    assert "MAKE DOES NOT KNOW SRVE" in head and command == f"make serve PYTHON={sys.executable} TP=4"


def test_ranks_that_cannot_share_the_model_are_refused_before_a_room_is_made(own_tree: Path) -> None:
    done = make(own_tree, "serve", "TP=3")
    head, command = the_report(done)
    assert "3 RANKS CANNOT SHARE" in head and command == f"make serve PYTHON={sys.executable} TP=2"
    assert not (own_tree / "build").exists() and done.stdout == ""


@pytest.mark.parametrize("word", ["TP=x", "MAX_TOKENS=0", "ENGINE=vllm", "HTTP_PORT=x", "MODEL=none"])
def test_the_command_of_a_report_would_be_taken(own_tree: Path, word: str) -> None:
    _, command = the_report(make(own_tree, "serve", word))
    again = subprocess.run(
        ["make", "-n", *shlex.split(command)[1:]], cwd=own_tree, capture_output=True, text=True, check=False
    )
    assert (again.returncode, again.stderr) == (0, ""), command


def test_a_space_at_the_end_is_not_part_of_a_setting(made: Path) -> None:
    assert make(made, "-q", "model_repo", "MODEL=stories ", "TP= 2").returncode == 0


def test_nothing_is_installed_for_a_wrong_setting(own_tree: Path) -> None:
    done = subprocess.run(
        ["make", "-j4", "ask", "MAX_TOKENS=x"], cwd=own_tree, capture_output=True, text=True, timeout=60, check=False
    )
    assert "MAX_TOKENS CANNOT BE" in the_report(done)[0]
    assert not (own_tree / ".venv").exists()


def test_a_missing_interpreter_is_a_report(own_tree: Path) -> None:
    assert "NO SUCH INTERPRETER" in the_report(make(own_tree, "hf", "PYTHON=/nowhere/python3"))[0]


@pytest.mark.parametrize(
    ("words", "title"),
    [
        (["MAX_SEQ_LEN=4096"], "MAX_SEQ_LEN IS TOO LARGE"),
        (["MAX_INPUT_LEN=512"], "MAX_INPUT_LEN IS TOO LARGE"),
        (["MAX_SEQ_LEN=1"], "MAX_SEQ_LEN CANNOT BE 1"),
        (["MAX_NUM_TOKENS=1"], "MAX_BATCH_SIZE IS TOO LARGE"),
        (["CONTEXT=128", "MODEL=build/stories/hf"], "CONTEXT CANNOT BE 128"),
    ],
    ids=" ".join,
)
def test_what_this_model_cannot_do_is_a_report(made_tree: Path, words: list[str], title: str) -> None:
    assert make(made_tree, "hf").returncode == 0
    assert title in the_report(make(made_tree, "engines", *words))[0]


def test_a_shorter_context_is_one_setting(made: Path) -> None:
    """MAX_INPUT_LEN follows MAX_SEQ_LEN."""
    assert "--max-input-len= --max-seq-len=128" in make(made, "-n", "model_repo", "MAX_SEQ_LEN=128").stdout


# --- a model in a folder ----------------------------------------------------------------------------------------------


def test_a_folder_is_one_room_however_it_is_spelled(made_tree: Path, tmp_path: Path) -> None:
    real = tmp_path / "모델 #1/Llama 2"
    shutil.copytree(made_tree / "models/stories", real)
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "above").symlink_to(real.parent)
    room = made_tree / f"build/Llama_2-{hashlib.sha256(str(real).encode()).hexdigest()[:8]}"
    done = make(made_tree, "config", f"MODEL={tmp_path}/link", "CONTEXT=512")
    assert (done.returncode, filled(done.stdout)) == (0, ["config"]), done.stderr
    assert files_below(room / "config") == files_below(made_tree / CONFIG)
    (tmp_path / "plain").symlink_to("link")
    for spelling in (f"{tmp_path}/link/", "../link", f"{tmp_path}/./plain//", "../copy/../plain"):
        assert make(made_tree, "-q", "config", f"MODEL={spelling}", "CONTEXT=512").returncode == 0, spelling
    assert make(made_tree, "-q", "config", f"MODEL={tmp_path}/link", "CONTEXT=256").returncode == 1


def test_a_hugging_face_folder_is_told_by_its_content(made_tree: Path, tmp_path: Path) -> None:
    assert make(made_tree, "hf").returncode == 0
    shutil.copytree(made_tree / HF, tmp_path / "hf-llama", ignore=shutil.ignore_patterns("args*", "manifest.json"))
    done = make(made_tree, "checkpoint", "hf", f"MODEL={tmp_path}/hf-llama")
    assert (done.returncode, filled(done.stdout)) == (0, ["config", "checkpoint", "hf"]), done.stderr
    [room] = made_tree.glob("build/hf-llama-*")
    assert os.path.samefile(room / "hf/model.safetensors", tmp_path / "hf-llama/model.safetensors")
    ours = {
        name: content
        for name, content in files_below(room / "torch-0.8.0-tp2-source/checkpoint").items()
        if "rank" in name
    }
    assert ours and ours.items() <= files_below(made_tree / VARIANT / "checkpoint").items()


def test_the_whole_model_is_made_for_those_who_need_it_and_costs_the_others_nothing(made_tree: Path) -> None:
    done = make(made_tree, "hf")
    assert (done.returncode, filled(done.stdout)) == (0, ["hf"]), done.stderr
    assert asked_for(made_tree) == []
    edit(made_tree / "scripts/build_hf.py")
    assert asked_for(made_tree) == []
    wanted = make(made_tree, "-n", "verified").stdout
    assert re.findall(r"-m scripts\.build_(\w+)", wanted) == ["hf", "verified"]
    quantized = make(made_tree, "-n", "checkpoint", "ENGINE=tensorrt", "TOOLCHAIN=0.8.0", "QUANT=int8_wo").stdout
    assert re.findall(r"-m scripts\.build_(\w+)", quantized) == ["hf", "checkpoint"]


def test_an_empty_folder_is_a_report(own_tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "NO MODEL IN THIS FOLDER" in the_report(make(own_tree, "hf", f"MODEL={tmp_path}/empty"))[0]


def test_a_folder_and_weights_together_are_a_report(own_tree: Path) -> None:
    assert "TWO PLACES" in the_report(make(own_tree, "hf", "MODEL=models/stories", "WEIGHTS=/tmp"))[0]


def test_weights_elsewhere_under_a_presets_name(made_tree: Path, tmp_path: Path) -> None:
    shutil.copytree(made_tree / "models/stories", tmp_path / "elsewhere")
    assert asked_for(made_tree, f"WEIGHTS={tmp_path}/elsewhere/") == ROOMS


# --- kill -9, a full disk, two makes ----------------------------------------------------------------------------------


def kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for_content(process: subprocess.Popen[str], folder: Path) -> None:
    """Until the first file lies in `folder`, or make has ended."""
    while process.poll() is None:
        with contextlib.suppress(OSError):
            if any(os.scandir(folder)):
                return
        time.sleep(0.0005)


def test_kill_9_while_any_room_is_filled(own_tree: Path, made: Path) -> None:
    for room in ROOMS:
        place = own_tree / PLACES[room]
        for _ in range(20):
            process = start(own_tree, room)
            wait_for_content(process, place.with_name(f"{room}.partial"))
            kill_group(process)
            if not place.exists():
                break
            shutil.rmtree(place)  # it was faster than we: once more
        else:
            raise AssertionError(f"{room} could not be caught half-made")
        assert place.with_name(f"{room}.partial").is_dir()
    done = make(own_tree, "model_repo")
    assert done.returncode == 0, done.stderr
    assert files_below(own_tree / "build") == files_below(made / "build")
    assert make(own_tree, "-q", "model_repo").returncode == 0


@pytest.mark.parametrize("room", ["checkpoint", "engines"])
@pytest.mark.parametrize("between_renames", [False, True], ids=["before", "between"])
def test_kill_9_when_the_new_room_takes_the_place_of_the_old(made_tree: Path, room: str, between_renames: bool) -> None:
    place = made_tree / PLACES[room]
    partial, old = place.with_name(f"{room}.partial"), place.with_name(f"{room}.old")
    rooms, before = files_below(made_tree / "build"), stats_below(place)
    edit(made_tree / f"scripts/build_{room}.py")
    reader = os.open(place, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)  # as a script does that reads the room: the new one has to wait
    process = start(made_tree, room)
    assert process.stdout is not None
    assert any("still read by another make" in line for line in process.stdout)
    assert stats_below(place) == before
    kill_group(process)
    os.close(reader)
    assert stats_below(place) == before
    if between_renames:
        os.rename(place, old)
    done = make(made_tree, room)
    assert done.returncode == 0, done.stderr
    assert "whole already" in done.stdout and filled(done.stdout) == []
    assert not partial.exists() and not old.exists()
    assert files_below(made_tree / "build") == rooms
    assert make(made_tree, "-q", room).returncode == 0


def test_two_makes_at_once_fill_each_room_once(own_tree: Path, made: Path) -> None:
    processes = [start(own_tree, "model_repo") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(filled("".join(outputs))) == sorted(ROOMS), outputs
    assert files_below(own_tree / "build") == files_below(made / "build")
    assert not list(own_tree.rglob("*.partial"))
    assert make(own_tree, "-q", "model_repo").returncode == 0


def test_two_makes_for_two_variants_share_config(own_tree: Path) -> None:
    processes = [start(own_tree, "engines", f"TP={tp}") for tp in (1, 4)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(filled("".join(outputs))) == ["checkpoint", "checkpoint", "config", "engines", "engines"]


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    mount: list[str | Path] = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root and the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_a_report_and_the_next_make_goes_on(own_tree: Path, made: Path) -> None:
    rooms = files_below(made / "build")
    size_bytes = sum(map(len, rooms.values())) + (8 << 20)  # too little for a second checkpoint, which has 10.5 MB
    with small_disk(own_tree / "build", size_bytes):
        shutil.copytree(made / "build", own_tree / "build", dirs_exist_ok=True)
        before = stats_below(own_tree / VARIANT / "checkpoint")
        edit(own_tree / "scripts/build_checkpoint.py")
        head, _ = the_report(make(own_tree, "model_repo"))
        assert "DISK IS FULL" in head and head.endswith("checkpoint.partial")
        assert stats_below(own_tree / VARIANT / "checkpoint") == before
        subprocess.run(["mount", "-o", f"remount,size={2 * size_bytes}", own_tree / "build"], check=True)
        done = make(own_tree, "model_repo")
        assert (done.returncode, filled(done.stdout)) == (0, ROOMS[1:]), done.stderr
        assert files_below(own_tree / "build") == rooms


def test_a_limit_on_file_sizes_is_a_report_and_the_old_room_stays(made_tree: Path) -> None:
    before = stats_below(made_tree / VARIANT / "checkpoint")
    edit(made_tree / "scripts/build_checkpoint.py")
    process = start(
        made_tree, "model_repo", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "-- DISK IS FULL" in output and "File too large" in output and "Traceback" not in output
    assert stats_below(made_tree / VARIANT / "checkpoint") == before


def words_that_make(room: str) -> set[str]:
    """Words of the Makefile that make this room of a variant, themselves or through another word."""
    text = (ROOT / "Makefile").read_text()
    needs = dict(re.findall(r"^([a-z_-]+):(?!=)(.*?)(?:##|$)", text, re.MULTILINE))
    found = {word for word, wanted in needs.items() if room in wanted}
    while more := {word for word, wanted in needs.items() if found & set(re.findall(r"[a-z_-]+", wanted))} - found:
        found |= more
    return found


def test_every_word_that_bakes_knows_the_commit() -> None:
    """A word that makes the room image without the commit would bake the image again, as that of no commit."""
    assert {"image", "chart"} <= words_that_make("$(VARIANT)/image/") <= journey.GIT_WORDS


def test_every_word_that_makes_ranks_asks_whether_they_can_share_the_model() -> None:
    assert {"checkpoint", "serve", "bench"} <= words_that_make("$(VARIANT)/") <= choice.SPLIT
