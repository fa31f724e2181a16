"""make's decisions before a script runs never wait for a file of the model, whatever the file is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from scripts import reports
from scripts.making import choice, journey


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


def test_only_words_that_make_ranks_ask_whether_the_ranks_can_share_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TP is 2 unless it is typed; a model of 5 heads is read, and a running server is asked, all the same."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 5, "num_key_value_heads": 1,
        "hidden_size": 320, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 260, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    words = {*choice.SPLIT, "ask", "config", "hf", "fsck", "weights"}

    def answer(goal: str) -> None:
        journey.answer(choice.Typed([goal], {"MODEL": str(tmp_path)}), sorted(words))

    for goal in words - choice.SPLIT:
        answer(goal)
    for goal in choice.SPLIT:
        with pytest.raises(reports.Problem, match="2 ranks cannot share"):
            answer(goal)


def test_a_running_server_is_asked_without_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "at_hand", lambda values: False)
    for goal, names in {"ask": [], "push": [], "verify-image": [], "serve": ["WEIGHTS"]}.items():
        typed = choice.Typed([goal], {"MODEL": "llama-2-7b"})
        assert choice.refused(typed, choice.values_of(typed.settings)) == names


def test_localhost_is_an_address() -> None:
    assert choice.values_of({"HOST": "localhost"})["HOST"] == "127.0.0.1"
    assert choice.values_of({"HOST": "::1"})["HOST"] == "::1"


@pytest.mark.parametrize(
    ("goals", "command"),
    [(["serve", "TP", "2"], "make serve TP=2"), (["serve", "model", "stories"], "make serve MODEL=stories"),
     (["TP", "demo"], "make demo TP=2")],
)  # fmt: skip
def test_a_setting_typed_as_a_word_is_told_how_it_is_typed(
    monkeypatch: pytest.MonkeyPatch, goals: list[str], command: str
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(reports.Problem, match="is a setting") as caught:
        journey.answer(choice.Typed(goals, {}), ["demo", "model_repo", "pin", "serve"])
    assert caught.value.report().rstrip().endswith(command)


def test_an_empty_model_is_told_to_be_one_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(reports.Problem, match="MODEL cannot be empty") as caught:
        journey.answer(choice.Typed(["serve"], {"MODEL": ""}), ["serve"])
    assert caught.value.report().rstrip().endswith("make serve MODEL=stories")
