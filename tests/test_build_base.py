"""The base of the image, with a stand-in for mmdebstrap."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from project import ROOT

# Works until the test has read what is said of it, then fails.
MMDEBSTRAP = """#!/bin/bash
until [ -e "$READ" ]; do read -rt 0.05 <> <(:) || true; done
echo "E: a mirror is gone" >&2
exit 7
"""


def test_a_base_in_the_making_says_what_it_waits_for_and_what_it_downloads(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mmdebstrap").write_text(MMDEBSTRAP)
    (tmp_path / "bin/mmdebstrap").chmod(0o755)
    code = "from scripts import build_base, reports, room; room.SPEAK_SECONDS = 0.05; reports.run(build_base.main)"
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "READ": str(tmp_path / "read")}
    with subprocess.Popen(
        [sys.executable, "-c", code, "--output", str(tmp_path / "base")],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as making:  # fmt: skip
        assert making.stdout is not None and making.stderr is not None
        assert "a download of about" in making.stdout.readline()
        assert making.stderr.readline().startswith("base        waiting for mmdebstrap")
        (tmp_path / "read").touch()
        assert "E: a mirror is gone" in making.stderr.read()
    assert making.returncode == 1
