"""Names of a model's files: the table's own words, held against published folders' listings."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.weights import files

META = ["checklist.chk", "consolidated.00.pth", "consolidated.01.pth", "params.json"]
MISTRAL = ["config.json", "consolidated.safetensors", "model-00001-of-00002.safetensors", "params.json"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (META, True),
        (["params.json"], True),
        (MISTRAL, False),
        ([*MISTRAL, "consolidated.00.pth"], True),
        (["config.json", "model.safetensors"], False),
        ([], False),
    ],
)
def test_metas_form_is_known_by_its_names(names: list[str], expected: bool) -> None:
    assert files.in_metas_form(names) is expected


def test_weights_are_known_by_their_names_and_copies_of_them_do_not_count() -> None:
    assert files.weights_among([*META, "consolidated.pth"], ".pth") == [files.shard(0), files.shard(1)]
    assert files.weights_among(MISTRAL, ".safetensors") == ["model-00001-of-00002.safetensors"]
    assert files.weights_among(["pytorch_model.bin", "training_args.bin"], ".bin") == [files.BIN_SINGLE]


def test_what_is_read_is_every_form_and_nothing_else() -> None:
    known = [*META, *MISTRAL, *files.HF_FILES, *files.INDEXES.values(), "a.gguf"]
    assert [name for name in known if not files.READ.fullmatch(name)] == ["checklist.chk"]
    assert not any(files.READ.fullmatch(name) for name in ("README.md", "modeling_llama.py", "config.json.bak"))


def test_weights_are_counted_once_whatever_an_index_calls_them(tmp_path: Path) -> None:
    for name, size in (("part-1.safetensors", 3), ("part-2.safetensors", 4), ("notes.txt", 50)):
        (tmp_path / name).write_bytes(bytes(size))
    assert files.weights_bytes(tmp_path) == 7
    # Mistral's repositories have the same weights a second time, in consolidated.safetensors
    (tmp_path / "model.safetensors").write_bytes(bytes(20))
    assert files.weights_bytes(tmp_path) == 20
