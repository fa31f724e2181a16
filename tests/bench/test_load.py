"""`make bench`: loads, numbers, ceilings and the comparison; the page needs no other file.
The real run is on GPUs (docs/bench)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scripts import reports, synthetic
from scripts.bench import completions, vllm
from scripts.bench import load as bench
from scripts.bench import page as bench_page
from scripts.tokenizer import sentencepiece
from scripts.weights.shape import LlamaShape

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"max_batch_size": 8, "max_input_len": 256, "max_seq_len": 300}
SEVEN_B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "dtype": "bfloat16",
}


def test_loads_beyond_the_engines_limits_are_left_out() -> None:
    found = bench.points_of("16:16:1 16:16:9 257:1:1 256:45:1 256:44:8", LIMITS)
    assert found == [bench.Point(16, 16, 1), bench.Point(256, 44, 8)]


@pytest.mark.parametrize("text", ["16:16", "16:16:x", "0:1:1", "16:16:99"])
def test_a_load_that_is_none_is_a_report(text: str) -> None:
    with pytest.raises(reports.Problem, match="POINTS"):
        bench.points_of(text, LIMITS)


def test_a_points_numbers_follow_from_its_requests() -> None:
    """Two streams: tokens after 0.1, 0.2, 0.3 s and, the second, 0.2 s, then two at once after 0.6 s."""
    requests = [
        {"began": 10.0, "arrivals": [10.1, 10.2, 10.3], "tokens": [1, 1, 1]},
        {"began": 10.0, "arrivals": [10.2, 10.6], "tokens": [1, 2]},
    ]
    found = bench.summary(requests)
    assert found["tokens_per_second"] == pytest.approx(6 / 0.6)
    assert (found["ttft_ms_p50"], found["ttft_ms_p99"]) == pytest.approx((150, 200))
    assert (found["itl_ms_p50"], found["itl_ms_p99"]) == pytest.approx((150, 200))
    assert found["slowest_over_median"] == pytest.approx(0.6 / 0.45, rel=1e-4)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_memory_ceiling_counts_every_weight_of_a_step_once(tp_size: int) -> None:
    """All parameters but the embedding and the norms, whose rows a step does not read or hardly."""
    shape = LlamaShape(4096, 11008, 32, 32, 32, 32000)
    matrices = [size for name, size in shape.hf_tensors().items() if len(size) == 2 and "embed" not in name]
    expected = 2 * sum(rows * columns for rows, columns in matrices) / tp_size
    weights, per_position = bench.model_bytes({**SEVEN_B, "mapping": {"tp_size": tp_size}})
    assert weights == expected and per_position == 2 * 2 * 32 * 4096 // tp_size
    measured = {"copy_bytes_per_second": 3.0e12, "all_reduce_seconds": {}}
    found = bench.ceiling({**SEVEN_B, "mapping": {"tp_size": tp_size}}, measured, bench.Point(2, 2, 1))
    assert found["memory_tokens_per_second"] == pytest.approx(3.0e12 / (weights + 3 * per_position))


AIPERF = bench.Point(16, 64, 4)


def record(**metrics: float) -> dict[str, Any]:
    """What aiperf 0.13.0 writes of a request, as far as it is read here."""
    values = {"time_to_first_token": 86.5, "request_latency": 458.5, "output_sequence_length": 64, **metrics}
    return {
        "metadata": {"request_start_ns": 1795571190902004314},
        "metrics": {name: {"value": value, "unit": "ms"} for name, value in values.items()},
    }


def test_aiperfs_records_become_requests() -> None:
    [request] = bench.aiperf_requests([record()], AIPERF)
    found = bench.summary([request])
    assert found["ttft_ms_p50"] == pytest.approx(86.5, abs=0.01)
    assert found["itl_ms_p50"] == pytest.approx((458.5 - 86.5) / 63, rel=1e-4)
    assert found["tokens_per_second"] == pytest.approx(64 / 0.4585, rel=1e-4)


@pytest.mark.parametrize("broken", [record(output_sequence_length=63), {**record(), "error": {"message": "429"}}])
def test_a_request_of_aiperfs_that_failed_or_is_short_is_no_number(broken: dict[str, Any]) -> None:
    with pytest.raises(reports.Problem):
        bench.aiperf_requests([record(), broken], AIPERF)


def run(**changed: float) -> dict[str, Any]:
    row = {"side": "Triton", "tp_size": 2, "input_tokens": 16, "output_tokens": 16, "concurrency": 1}
    return {"rows": [{**row, "tokens_per_second": 100.0, "ttft_ms_p50": 10.0, **changed}]}


@pytest.mark.parametrize(
    ("changed", "worse"),
    [
        ({"tokens_per_second": 94.0}, ["tokens_per_second"]),
        ({"tokens_per_second": 96.0}, []),
        ({"ttft_ms_p50": 10.6, "tokens_per_second": 300.0}, ["ttft_ms_p50"]),
        ({"ttft_ms_p50": 5.0}, []),
    ],
)
def test_a_baseline_judges_by_what_is_better(changed: dict[str, float], worse: list[str]) -> None:
    assert [line["what"][-1] for line in bench.compared(run(**changed), run()) if line["worse"]] == worse


def test_a_file_that_is_no_run_is_a_report(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    for path in (tmp_path / "old.json", tmp_path / "missing.json"):
        with pytest.raises(reports.Problem, match="not a result of make bench"):
            bench_page.read_run(path)


def test_the_documented_run_is_one_and_its_page_needs_nothing_else() -> None:
    documented = bench_page.read_run(ROOT / "docs" / "bench" / "2x-h200-7b.json")
    assert documented["host"]["gpus"] and not documented["failed"]
    page = (ROOT / "docs" / "bench" / "2x-h200-7b.html").read_text()
    assert page.count("<svg") >= 4
    assert not re.search(r"<(script|link|img)|url\(http|src=", page)
    for row in documented["rows"]:
        assert f">{bench_page.significant(float(row['tokens_per_second']))}<" in page


def two_sides(ours: float, theirs: float) -> dict[str, Any]:
    documented = bench_page.read_run(ROOT / "docs" / "bench" / "2x-h200-7b.json")
    row = {"tp_size": 2, "input_tokens": 128, "output_tokens": 128, "concurrency": 8, "requests": 24}
    rows = [
        {**row, "side": "OpenAI's API", "tokens_per_second": ours},
        {**row, "side": "vLLM", "tokens_per_second": theirs},
    ]
    return {**documented, "rows": rows}


def test_the_page_says_what_was_reached_and_what_was_not() -> None:
    assert bench_page.reached(two_sides(110.0, 100.0)) == ["Ahead of vLLM, through the same API, at 1 of 1 loads."]
    [said] = bench_page.reached(two_sides(50.0, 100.0))
    assert "at 0 of 1 loads; slower" in said and "8 x 128+128 (0.50)" in said
    page = bench_page.page(two_sides(50.0, 100.0), "run.json")
    assert said.replace("'", "&#x27;") in page and 'href="run.json"' in page and "prefers-color-scheme: dark" in page


def test_each_tp_has_its_own_plots_and_sentences_name_it() -> None:
    run = two_sides(50.0, 100.0)
    run["rows"] += [{**row, "tp_size": 1, "tokens_per_second": 40.0} for row in run["rows"]]
    page = bench_page.page(run)
    assert "TP=1 and 2</h1>" in page
    assert "Throughput, TP=1" in page and "Throughput, TP=2" in page
    assert "8 x 128+128, TP=2 (0.50)" in page and ", TP=1 (" not in page


def test_numbers_have_three_digits_and_labels_do_not_lie_on_each_other() -> None:
    values = {13565.0: "13,600", 342.1: "342", 14.811: "14.8", 0.5064: "0.506", 1.0: "1.00"}
    assert {value: bench_page.significant(value) for value in values} == values
    placed = bench_page.spread([100.0, 100.0, 101.0, 300.0])
    assert placed == sorted(placed) and min(b - a for a, b in zip(placed, placed[1:])) >= bench_page.LABEL_HEIGHT - 1e-6


def test_every_round_has_a_number() -> None:
    def one(began: float, seconds: float) -> dict[str, Any]:
        return {"began": began, "arrivals": [began + seconds / 2, began + seconds], "tokens": [1, 9]}

    assert bench.rounds_of([one(2, 2), one(0, 1), one(1, 1)]) == [10.0, 10.0, 5.0]
    assert bench.summary([one(0, 1), one(1, 1), one(2, 2)])["rounds_low"] == 5.0


def test_an_answer_in_pieces_becomes_a_request() -> None:
    """A piece carries one token or, when the client is slow, some; the last line tells how many there were."""
    assert completions.times(1.0, [1.5, 2.0], 5) == {"began": 1.0, "arrivals": [1.5, 2.0], "tokens": [1, 4]}
    assert sum(completions.times(1.0, [1.5, 2.0, 2.5], 2)["tokens"]) == 2
    with pytest.raises(reports.Problem):
        completions.times(1.0, [], 0)


def test_vllm_gets_the_rooms_tokenizer_and_the_weights_of_the_model(tmp_path: Path) -> None:
    config, weights = tmp_path / "config", tmp_path / "weights"
    config.mkdir()
    weights.mkdir()
    for path in (
        config / "config.json",
        config / "tokenizer.json",
        config / "manifest.json",
        weights / "model.safetensors",
    ):
        path.write_text("{}")
    assert vllm.folder_of(config, weights, tmp_path / "both")
    assert {path.name for path in (tmp_path / "both").iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    (weights / "repeated.json").write_text("{}")
    assert not vllm.folder_of(config, weights, tmp_path / "config alone")
    with pytest.raises(vllm.NotRun, match="has no vllm|No such file"):
        vllm.version(str(tmp_path / "python"))


def test_the_synthetic_tokenizer_reads_any_text_as_the_bundled_one_does() -> None:
    bundled = synthetic.TOKENIZER.read_bytes()
    made = sentencepiece.parse_model(synthetic.tokenizer_model(bundled, 32000))
    assert made.vocab_size == 32000 and len({piece.text for piece in made.pieces}) == 32000
    from sentencepiece import SentencePieceProcessor

    ours = SentencePieceProcessor(model_proto=synthetic.tokenizer_model(bundled, 32000))
    theirs = SentencePieceProcessor(model_proto=bundled)
    for text in ("Once upon a time", "안녕하세요  세계", "word 2048 word2048x"):
        assert ours.encode(text) == theirs.encode(text)


def test_the_synthetic_model_is_whole_or_not_there(tmp_path: Path) -> None:
    shape = LlamaShape(16, 24, 2, 4, 2, 3000)
    synthetic.write(tmp_path / "model", shape, seed=1)
    from safetensors import safe_open

    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == shape.hf_tensors().keys()
    for name, file in index.items():
        with safe_open(tmp_path / "model" / file, framework="pt") as opened:
            assert tuple(opened.get_tensor(name).shape) == shape.hf_tensors()[name]
    assert not (tmp_path / "model.partial").exists()
