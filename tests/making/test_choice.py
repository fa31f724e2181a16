"""What make decides before a script runs never waits for a file of the model's, whatever the file is."""

from __future__ import annotations

import os
from pathlib import Path

from scripts.making import choice


def test_a_first_look_at_the_heads_reads_plain_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    os.mkfifo(tmp_path / "params.json")
    assert choice.sizes_known({"WEIGHTS": str(tmp_path), "MODEL": "none"}) == set()


def test_a_deep_or_a_large_file_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert choice.sizes_known({"WEIGHTS": str(tmp_path), "MODEL": "none"}) == set()
    (tmp_path / "config.json").write_text('{"num_attention_heads": 8, "x": "' + "y" * (1 << 20) + '"}')
    assert choice.sizes_known({"WEIGHTS": str(tmp_path), "MODEL": "none"}) == set()
    (tmp_path / "config.json").write_text('{"num_attention_heads": 8, "num_key_value_heads": 2}')
    assert choice.sizes_known({"WEIGHTS": str(tmp_path), "MODEL": "none"}) == {8, 2}
