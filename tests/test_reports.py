"""Reports: what a user reads when something foreseen goes wrong, and what stays a traceback because it is our bug."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import reports

ROOT = Path(__file__).resolve().parents[1]


def run(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of one function, run as ours are."""
    code = f"import os\nfrom pathlib import Path\nfrom scripts import reports\ndef main():\n    {body}\nreports.run(main)\n"
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=60
    )


def test_a_report_names_the_place_and_both_values_and_ends_in_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAKE_SETTINGS", "MODEL=llama-2-7b\n TP=3\n")
    report = reports.settings.bad_setting("TP", 3, "2 or 4", reports.make("serve", TP=2)).report()
    lines = report.splitlines()
    assert lines[0].startswith("-- TP CANNOT BE 3 ---") and lines[0].endswith("--- Makefile")
    assert "TP is '3'; it must be 2 or 4." in lines
    assert lines[-1] == "    make serve MODEL=llama-2-7b TP=2"
    assert max(map(len, lines)) == reports.WIDTH


def test_the_command_holds_what_the_user_typed_so_that_a_shell_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAKE_SETTINGS", "HOST=two words\n PYTHON=/usr/bin/python3\n")
    assert reports.make("ask", PROMPT='say "a"', PYTHON="") == """make ask HOST='two words' PYTHON= PROMPT='say "a"'"""


def test_a_problem_goes_to_stderr_without_a_traceback() -> None:
    done = run("raise reports.rooms.room_missing('build/x/hf')")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.rstrip().endswith("    make hf")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_is_a_report_that_says_where_and_why(number: int) -> None:
    done = run(f"raise OSError({number}, os.strerror({number}), '/tmp/x/checkpoint.partial')")
    assert done.returncode == 1
    assert "-- DISK IS FULL ---" in done.stderr
    assert os.strerror(number) in done.stderr and "/tmp/x/checkpoint.partial" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_forbidden_file_is_a_report(number: int) -> None:
    done = run(f"raise OSError({number}, os.strerror({number}), 'build/stories')")
    assert done.returncode == 1
    assert f"build/stories: {os.strerror(number)}" in done.stderr
    assert "Traceback" not in done.stderr


def test_our_own_bug_keeps_its_traceback() -> None:
    done = run("raise OSError(5, 'Input/output error', 'x')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_reader_that_goes_away_is_no_failure_to_tell_of() -> None:
    """make hf | head -1"""
    script = "[print('x' * 1000, flush=True) for _ in range(1000)]"
    process = subprocess.Popen(
        [sys.executable, "-c", f"from scripts import reports\nreports.run(lambda: {script})"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 128 + signal.SIGPIPE
    process.stderr.close()


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    done = run("import no_such_package")
    assert done.returncode == 1
    assert "lacks the module no_such_package" in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith(f"    {sys.executable} -m pip install")


def test_an_interpreter_without_packages_is_a_report_that_does_not_touch_it(own_tree: Path) -> None:
    """PYTHON= names an interpreter that has nothing: no traceback, its name,
    and no advice to install into it globally."""
    bare = own_tree / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True, timeout=120)
    command = ["make", "config", f"PYTHON={bare}/bin/python"]
    done = subprocess.run(command, cwd=own_tree, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "-- NO PACKAGE NUMPY" in done.stderr
    assert f"{bare}/bin/python -m pip install --no-deps --require-hashes" in done.stderr
    (bare / "pyvenv.cfg").unlink()  # now it is the machine's own Python under another name
    code = "from scripts.reports import packages; print(packages.package_missing('numpy').command)"
    shown = subprocess.run([f"{bare}/bin/python", "-c", code], cwd=own_tree, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "make serve PYTHON="


def test_the_page_of_all_reports_is_theirs() -> None:
    """docs/troubleshooting.md is made by `python -m scripts.reports`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("BAKE_SETTINGS", "BAKED_IMAGE")}
    command = [sys.executable, "-m", "scripts.reports"]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert made.stdout == (ROOT / "docs/troubleshooting.md").read_text(), (
        "type: python -m scripts.reports > docs/troubleshooting.md"
    )
    assert made.stdout.count("\n| ") > 130
