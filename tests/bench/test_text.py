"""`make bench-text` measures what it says: the stand-in gives the prompt's tokens, stock breaks its text,
ours does not."""

from __future__ import annotations

import json
from pathlib import Path

from project import make

from scripts.bench import text as bench_text
from scripts.build_model_repo import model_config_type


def test_stocks_models_are_those_of_nvidia_by_their_own_table() -> None:
    from google.protobuf import text_format

    configs = {
        name: text_format.Parse(text, model_config_type()()) for name, text in bench_text.stock_configs("x").items()
    }
    steps = configs["stock_ensemble"].ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["stock_preprocessing", "tensorrt_llm", "stock_postprocessing"]
    assert not any(config.HasField("dynamic_batching") for config in configs.values())
    assert len(configs["stock_postprocessing"].output) == 5


def test_a_short_run(tree: Path) -> None:
    done = make(tree, "bench-text", "TP=1", "BENCH=--rounds 1 --seconds 1")
    assert done.returncode == 0, done.stderr
    result = json.loads((tree / "build/bench-text.json").read_text())
    for numbers in result["found"].values():
        assert numbers["ours"]["wrong_texts"] == 0 < numbers["ours"]["answers"]
        assert numbers["stock"]["wrong_texts"] == numbers["stock"]["answers"] > 0
    assert "ours_to_stock" in done.stdout and set(result["ratios"]) == set(bench_text.verdicts(result["found"]))
