"""The virtual environment: when it is made, what an interrupted installation costs, and when it cannot be made at all.

Nothing is installed: every program that the script calls is a stand-in that notes its arguments.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from project import ROOT, copy_of_project

# Answers what a sound CPython 3.12 with PyTorch's CPU wheel would, but for what the environment says is wrong.
PYTHON = r"""#!/usr/bin/env bash
name=${0##*/}
case "$1 ${2:-}" in
"-ESB -m") exec @real@ "$@" ;; # make decides with it, as with any python3
"-c import platform"*) [[ " ${SHIMS:-} " != *" $name "* ]] || { echo "pyenv: $name: command not found" >&2; exit 127; } ;;
"-c import pip"*) [ -z "${GLOBAL:-}" ] || [ -e "$RECORD.remade" ] || { touch "$RECORD.remade"; exit 1; } ;;
"-c import sys"*) echo 3.12 ;;
"-c import ensurepip"*) [ -z "${NO_VENV:-}" ] ;;
"- ") [ -z "${NO_LIBPYTHON:-}" ] ;;
"-c import importlib"*) [ -z "${CUDA:-}" ] ;;
"-m venv") echo "venv by $name" >>"$RECORD"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pip")
    list=${*: -1} over=
    [[ " $* " != *" --ignore-installed "* ]] || over=" over"
    if [ "$list" = /dev/stdin ]; then cat >"$RECORD.stdin"; echo "pip cpu$over" >>"$RECORD"; [ -z "${CUDA:-}" ]; exit; fi
    echo "pip ${list##*/}$over" >>"$RECORD"
    [ "$list" != "${FAILS:-}" ] || { echo "no matching distribution" >&2; exit 1; }
    [ "$list" != "${HANGS:-}" ] || { echo hangs; exec sleep 60; }
    ;;
esac
""".replace("@real@", shlex.quote(sys.executable))
ALL = ["pip run.txt", "pip cpu", "pip torch.txt", "pip openai.txt"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A Makefile, the script, short locks, and the stand-ins in bin/."""
    (tmp_path / "project").mkdir()
    for part in ("Makefile", "scripts", "docker", "models", "model_repo_template"):
        (tmp_path / "project" / part).symlink_to(ROOT / part)
    (tmp_path / "project/requirements").mkdir()
    for name in ("run", "torch", "torch-cuda", "openai", "verify", "test", "dev"):
        (tmp_path / f"project/requirements/{name}.txt").write_text(f"{name}==1.0 --hash=sha256:00\n")
    (tmp_path / "bin").mkdir()
    for name in ("python3.12", "python3.11", "python3"):
        stand_in(tmp_path, name, PYTHON)
    return tmp_path / "project"


def stand_in(folder: Path, name: str, text: str) -> None:
    (folder / "bin" / name).write_text(text)
    (folder / "bin" / name).chmod(0o755)


def environment(project: Path, **changed: str) -> dict[str, str]:
    path = f"{project.parent}/bin:/usr/local/bin:/usr/bin:/bin"
    return {**os.environ, "PATH": path, "RECORD": str(project.parent / "record"), **changed}


def make(project: Path, target: str = ".venv/locks/run.txt", **changed: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", target],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(project, **changed),
    )


def recorded(project: Path) -> list[str]:
    """What was called since the last time this was asked."""
    record = project.parent / "record"
    lines = record.read_text().splitlines() if record.exists() else []
    record.unlink(missing_ok=True)
    return lines


def made(project: Path) -> None:
    assert make(project).returncode == 0
    assert recorded(project) == ["venv by python3.12", *ALL]


def the_report(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and lines[-1].startswith("make: ***"), done.stderr
    assert lines[-2].startswith("    "), done.stderr
    return next(line for line in lines if line.startswith("-- "))


def test_it_is_made_once(project: Path) -> None:
    made(project)
    assert make(project).returncode == 0
    assert recorded(project) == []
    assert (project / ".venv/locks/run.txt").read_text() == (project / "requirements/run.txt").read_text()


def test_the_first_installation_says_its_size_and_has_the_endpoints_packages(project: Path) -> None:
    """Nothing is left to download for `make serve` after the rooms are made."""
    done = make(project)
    assert re.search(r"about \d+ MB to download, [\d.]+ GB where", done.stdout), done.stdout
    assert done.stdout.index("to download") < done.stdout.index("installing")
    recorded(project)
    assert make(project, ".venv/locks/openai.txt").returncode == 0
    assert recorded(project) == []


@pytest.mark.parametrize("name", ["run", "openai"])
def test_each_list_is_installed_once(project: Path, name: str) -> None:
    assert make(project, f".venv/locks/{name}.txt").returncode == 0
    assert recorded(project) == ["venv by python3.12", *ALL]


@pytest.mark.parametrize("lock", ["run.txt", "torch.txt"])
def test_a_changed_lock_is_installed_into_it(project: Path, lock: str) -> None:
    made(project)
    with (project / "requirements" / lock).open("a") as file:
        file.write("more==1.0 --hash=sha256:00\n")
    os.utime(project / "requirements" / lock, (2**31, 2**31))
    assert make(project).returncode == 0
    assert recorded(project) == ALL


def test_more_packages_come_after_those_of_the_journey(project: Path) -> None:
    assert make(project, ".venv/locks/test.txt").returncode == 0
    assert recorded(project) == ["venv by python3.12", *ALL, "pip test.txt"]


def test_a_program_whose_needs_are_not_ours_has_an_environment_of_its_own(project: Path) -> None:
    (project / "requirements/aiperf.txt").write_text("aiperf==1.0 --hash=sha256:00\n")
    assert make(project, ".venv/locks/aiperf.txt").returncode == 0
    assert recorded(project) == ["venv by python3.12", *ALL, "venv by python", "pip aiperf.txt"]
    assert (project / ".venv/aiperf/bin/python").exists()


def test_many_jobs_install_one_list_at_a_time(project: Path) -> None:
    done = subprocess.run(
        ["make", "-j4", *(f".venv/locks/{name}.txt" for name in ("dev", "test", "verify"))],
        cwd=project, env=environment(project), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = recorded(project)
    assert calls[:5] == ["venv by python3.12", *ALL]
    assert sorted(calls[5:]) == ["pip dev.txt", "pip test.txt", "pip verify.txt"]


def test_a_given_interpreter_makes_none(project: Path) -> None:
    (project / "given").write_text(f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
    (project / "given").chmod(0o755)
    done = subprocess.run(
        ["make", "-n", "serve", "test", "lint", "PYTHON=./given"],
        cwd=project, env=environment(project), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "make_venv" not in done.stdout and ".venv" not in done.stdout


def test_the_cpu_wheel_is_tried_first_and_the_cuda_one_brings_its_libraries(project: Path) -> None:
    (project / "requirements/torch.txt").write_text("sympy==1 --hash=sha256:00\ntorch==2.13.0 --hash=sha256:00\n")
    assert make(project, CUDA="1").returncode == 0
    assert recorded(project) == ["venv by python3.12", *ALL[:3], "pip torch-cuda.txt", ALL[3]]
    assert (project.parent / "record.stdin").read_text() == "torch==2.13.0+cpu --hash=sha256:00\n"


def test_a_shim_that_only_prints_an_error_is_passed_over(project: Path) -> None:
    assert make(project, SHIMS="python3.12 python3.11").returncode == 0
    assert recorded(project)[0] == "venv by python3"


@pytest.mark.parametrize("fails", ["requirements/run.txt", "requirements/torch.txt"])
def test_no_network_is_a_report_and_what_is_there_stays(project: Path, fails: str) -> None:
    done = make(project, FAILS=fails)
    assert "PACKAGES COULD NOT BE INSTALLED" in the_report(done)
    assert "no matching distribution" in done.stderr
    recorded(project)
    assert make(project).returncode == 0
    assert recorded(project) == ALL


@pytest.mark.parametrize(("target", "hangs"), [("run", "torch"), ("test", "test")])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_installation_repeats_that_list_alone(
    project: Path, target: str, hangs: str, number: signal.Signals
) -> None:
    """pip, killed half-way, may leave a package that it takes for whole:
    the list is installed over what is there. PyTorch stays."""
    interrupt(project, target, hangs, number)
    assert make(project, f".venv/locks/{target}.txt").returncode == 0
    assert recorded(project) == (
        ["pip test.txt over"]
        if target == "test"
        else ["pip run.txt", "pip cpu over", "pip torch.txt over", "pip openai.txt"]
    )
    assert make(project, f".venv/locks/{target}.txt").returncode == 0
    assert recorded(project) == []


def interrupt(project: Path, target: str, hangs: str, number: signal.Signals) -> None:
    """Begin an installation and end it, with all it started, in the middle of a list."""
    process = subprocess.Popen(
        ["make", f".venv/locks/{target}.txt"], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True, env=environment(project, HANGS=f"requirements/{hangs}.txt"),
    )  # fmt: skip
    assert process.stdout is not None
    assert any(line == "hangs\n" for line in process.stdout)
    os.killpg(process.pid, number)
    assert process.wait(30) != 0
    process.stdout.close()
    recorded(project)


def test_a_list_that_was_interrupted_is_made_whole_before_another_is_installed(project: Path) -> None:
    interrupt(project, "test", "test", signal.SIGKILL)
    assert make(project, ".venv/locks/verify.txt").returncode == 0
    assert recorded(project) == ["pip test.txt over", "pip verify.txt"]
    assert make(project, ".venv/locks/test.txt").returncode == 0
    assert recorded(project) == []


def test_nothing_is_installed_into_a_python_that_is_no_virtual_environment(project: Path) -> None:
    """Without pyvenv.cfg .venv/bin/python is the machine's own Python under another name."""
    made(project)
    assert make(project, ".venv/locks/test.txt", GLOBAL="1").returncode == 0
    assert recorded(project) == ["venv by python3.12", *ALL, "pip test.txt"]


def test_a_tree_that_cannot_be_written_is_one_report(project: Path) -> None:
    (project / ".venv").write_text("a file where the folder should be")
    stand_in(project.parent, "rm", "#!/bin/sh\nexit 1\n")
    done = make(project)
    assert "THIS TREE CANNOT BE WRITTEN" in the_report(done) and "ls -ld" in done.stderr
    assert recorded(project) == []


def test_an_interpreter_that_went_away_is_replaced(project: Path) -> None:
    made(project)
    (project / ".venv/bin/python").unlink()
    (project / ".venv/bin/python").symlink_to("/nowhere/python3.12")
    assert make(project).returncode == 0
    assert recorded(project) == ["venv by python3.12", *ALL]


def test_a_second_make_waits_and_installs_nothing(project: Path) -> None:
    first = subprocess.Popen(
        ["flock", "requirements", "cat"], cwd=project, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdin is not None and first.stdout is not None
    first.stdin.write("locked\n")
    first.stdin.flush()
    assert first.stdout.readline() == "locked\n"
    second = subprocess.Popen(
        ["make", ".venv/locks/run.txt"], cwd=project, stdout=subprocess.PIPE, text=True, env=environment(project)
    )
    assert second.stdout is not None
    assert "waiting" in second.stdout.readline()
    (project / ".venv/locks").mkdir(parents=True)  # what the first one leaves when it is done
    (project / ".venv/locks/run.txt").write_bytes((project / "requirements/run.txt").read_bytes())
    first.communicate()
    second.communicate(timeout=30)
    assert (second.returncode, recorded(project)) == (0, [])


@pytest.mark.parametrize(
    ("program", "text", "title"),
    [
        ("uname", "[ $1 = -s ] && echo Darwin || echo arm64", "THIS SYSTEM CANNOT RUN IT"),
        ("uname", "[ $1 = -s ] && echo Linux || echo aarch64", "THIS SYSTEM CANNOT RUN IT"),
        ("getconf", "echo glibc 2.31", "THE C LIBRARY IS TOO OLD"),
        ("getconf", "echo glibc 2.4", "THE C LIBRARY IS TOO OLD"),
        ("getconf", "exit 1", "THE C LIBRARY IS TOO OLD"),
    ],
)
def test_a_system_that_cannot_run_it_is_a_report(project: Path, program: str, text: str, title: str) -> None:
    stand_in(project.parent, program, f"#!/bin/sh\n{text}\n")
    assert title in the_report(make(project))
    assert recorded(project) == [] and not (project / ".venv").exists()


@pytest.mark.parametrize(
    ("wrong", "title", "command"),
    [
        ({"SHIMS": "python3.12 python3.11 python3"}, "NO PYTHON 3.11 OR 3.12", "apt-get install python3.11"),
        ({"NO_VENV": "1"}, "PYTHON HAS NO VENV MODULE", "apt-get install python3.12-venv"),
        ({"NO_LIBPYTHON": "1"}, "NO SHARED LIBPYTHON", "apt-get install libpython3.12"),
    ],
)
def test_an_interpreter_that_will_not_do_is_a_report(
    project: Path, wrong: dict[str, str], title: str, command: str
) -> None:
    done = make(project, **wrong)
    assert title in the_report(done)
    assert command in done.stderr
    assert recorded(project) == [] and not (project / ".venv").exists()


def test_the_pinned_lists_are_complete(tmp_path: Path) -> None:
    """They are installed without their dependencies:
    an interpreter that has these packages and no other makes the rooms."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to(os.path.realpath(sys.executable))
    home = Path(os.path.realpath(sys.executable)).parent
    (tmp_path / "venv/pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    packages = tmp_path / f"venv/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    packages.mkdir(parents=True)
    locks = (ROOT / "requirements/run.txt").read_text() + (ROOT / "requirements/torch.txt").read_text()
    for name in re.findall(r"^([\w.-]+)==", locks, re.MULTILINE):
        for top in {file.parts[0] for file in metadata.distribution(name).files or [] if file.parts[0] != ".."}:
            if top != "__pycache__":
                (packages / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    tree = copy_of_project(tmp_path / "tree")
    python = f"{tmp_path}/venv/bin/python"
    done = subprocess.run(
        ["make", "model_repo", f"PYTHON={python}"], cwd=tree, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    imports = "import scripts.ask, scripts.demo, scripts.serve, scripts.doctor, mpi4py, engine, llama, sampling, text, tritonclient.grpc"
    path = [
        str(tree),
        *(str(tree / f"model_repo_template/{model}/1") for model in ("tensorrt_llm", "tensorrt_llm_bls")),
    ]
    subprocess.run(
        [python, "-c", imports], env={**os.environ, "PYTHONPATH": ":".join(path)}, cwd=tree, check=True, timeout=60
    )
