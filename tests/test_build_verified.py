"""The accuracy gate lets a right engine through, stops a wrong one with a report, and takes rounding for rounding."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from project import make
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from scripts import build_verified, reports
from scripts.verifying import compare, sides
from scripts.verifying import page as verified_report

VARIANT = Path("build/stories/torch-0.8.0-tp2-float16")
FLOAT32 = compare.thresholds("float32")

# --- the room, by make ---


@pytest.fixture(scope="module")
def verified(tree: Path) -> Path:
    done = make(tree, "verified")
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / VARIANT / "verified"


def test_the_engine_of_the_bundled_model_passes(verified: Path) -> None:
    report = json.loads((verified / "report.json").read_text())
    assert report["passed"] and all(check["passed"] for check in report["checks"])
    assert report["asked"]["prompts"] == len(report["prompts"]) >= 64
    assert report["greedy_tokens"]["equal"] == report["greedy_tokens"]["asked"] == 16 * len(report["prompts"])
    story = next(one for one in report["prompts"] if one["prompt"] == "Once upon a time")
    assert story["engine"] == story["hugging_face"]
    assert story["engine"].startswith(
        ", in a small village surrounded by a beautiful forest, there lived a little girl"
    )
    assert json.loads((verified / "manifest.json").read_text())["facts"]["passed"] is True


def test_the_page_needs_nothing_and_says_the_verdict_first(verified: Path) -> None:
    page = (verified / "report.html").read_text()
    assert page.index("The engine says what Hugging Face&#x27;s model says".replace("&#x27;", "'")) < page.index(
        "<table>"
    )
    assert not any(word in page for word in ("<script", "http:", "https:", "src=", "url("))


def test_the_room_knows_no_path_and_is_made_once(tree: Path, verified: Path) -> None:
    content = b"".join(path.read_bytes() for path in verified.iterdir())
    assert str(tree).encode() not in content and sys.prefix.encode() not in content
    assert make(tree, "-q", "verified").returncode == 0


@pytest.mark.parametrize("file", ["scripts/verifying/sides.py", "scripts/verifying/compare.py", "models/prompts.txt"])
def test_a_changed_judge_judges_again_and_makes_nothing_else(tree: Path, verified: Path, file: str) -> None:
    source = (tree / file).read_bytes()
    try:
        (tree / file).write_bytes(source + b"\nCHANGED = 1\n")
        would = make(tree, "-n", "verified").stdout
    finally:
        (tree / file).write_bytes(source)
    assert "scripts.build_verified" in would and would.count("scripts.build_") == 1


def swap_in_one_rank(ranks: list[dict[str, torch.Tensor]]) -> None:
    """What a converter does that takes upstream's crossed names for Hugging Face's."""
    fc, gate = (f"transformer.layers.2.mlp.{name}.weight" for name in ("fc", "gate"))
    ranks[0][fc], ranks[0][gate] = ranks[0][gate], ranks[0][fc]


def swap_between_ranks(ranks: list[dict[str, torch.Tensor]]) -> None:
    name = "transformer.layers.3.attention.dense.weight"
    ranks[0][name], ranks[1][name] = ranks[1][name], ranks[0][name]


@pytest.mark.parametrize("swap", [swap_in_one_rank, swap_between_ranks])
def test_one_swapped_tensor_is_found(tree: Path, verified: Path, tmp_path: Path, swap: Any) -> None:
    engines, room = tmp_path / "engines", tmp_path / "verified"
    shutil.copytree(tree / VARIANT / "engines", engines)
    ranks = [load_file(engines / f"rank{rank}.safetensors") for rank in range(2)]
    swap(ranks)
    for rank, tensors in enumerate(ranks):
        (engines / f"rank{rank}.safetensors").unlink()  # a hard link to the checkpoint's
        save_file(tensors, engines / f"rank{rank}.safetensors")
    few = tmp_path / "few.txt"
    few.write_text("Once upon a time\nThe little dog\n옛날 옛적에\n")
    command = [sys.executable, "-m", "scripts.build_verified", "--engines", str(engines), "--hf", "build/stories/hf"]
    done = subprocess.run(
        [*command, "--output", str(room), "--prompts", str(few)],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    page = tmp_path / "verified.partial" / "report.html"
    assert (done.returncode, room.exists(), page.is_file()) == (1, False, True), done.stderr
    assert "something else" in page.read_text()
    report = json.loads(page.with_name("report.json").read_text())
    assert not report["passed"]
    said = " ".join(done.stderr.split())
    worst = report["prompts"][0]
    assert str(page) in said and repr(worst["prompt"]) in said and "Traceback" not in said
    assert (
        f"{worst['worst']['hugging_face']:g} for Hugging Face's model and {worst['worst']['engine']:g} for the engine"
        in said
    )
    assert done.stderr.rstrip().splitlines()[-1].strip().endswith("make verified")


# --- what is asked ---


def test_at_least_64_different_short_prompts_are_asked() -> None:
    prompts = build_verified.prompts_of(build_verified.PROMPTS.read_text())
    assert len(set(prompts)) == len(prompts) >= 64
    assert max(map(len, prompts)) < 80
    assert any("가" <= character <= "힣" for prompt in prompts for character in prompt)


@pytest.mark.parametrize(
    "limits, lengths, new",
    [((256, 512), [3, 9], 16), ((5, 512), [3, 5], 16), ((8, 9), [1, 1], 8), ((7, 20), [3, 4], 16)],
)
def test_prompts_are_cut_to_what_the_engine_takes(limits: tuple[int, int], lengths: list[int], new: int) -> None:
    asked = build_verified.questions([list(range(3)), list(range(9))], *limits)
    assert ([len(ids) for ids in asked["prompts"]], asked["answer_tokens"]) == (lengths, new)


def test_prompts_asked_together_have_one_length() -> None:
    prompts = [[0] * length for length in [3, 5] + [4] * 40 + [3]]
    found = list(sides.groups(prompts))
    assert sorted(i for group in found for i in group) == list(range(len(prompts)))
    assert all(len({len(prompts[i]) for i in group}) == 1 and len(group) <= sides.AT_ONCE for group in found)


# --- how Hugging Face's side and the engine's are read ---


def test_the_reference_is_what_one_uncached_forward_says() -> None:
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2
        )
    ).eval()  # fmt: skip
    prompts = [[1, 17, 80, 4], [1, 5, 99, 42]]
    for prompt, said in zip(prompts, sides.continue_group(model, prompts, answer_tokens=5, top_k=7), strict=True):
        reference = compare.Reference(**said)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *reference.tokens]])).logits[0, :-1]
        expected = logits.log_softmax(-1)
        assert list(reference.tokens) == logits.argmax(-1)[3:].tolist()
        top = expected.topk(7)
        assert torch.equal(top.indices, torch.tensor(reference.top_ids))
        torch.testing.assert_close(top.values, torch.tensor(reference.log_probs), atol=1e-5, rtol=0)
        own = [expected[i, prompt[i + 1]].item() for i in range(3)]
        assert reference.prompt_log_probs == pytest.approx(own, abs=1e-5)


class Piece:
    """engine.py's Piece, as far as it is read."""

    def __init__(self, tokens: tuple[int, ...], context: torch.Tensor | None, generation: torch.Tensor | None) -> None:
        self.tokens, self.context_logits, self.generation_logits, self.error = tokens, context, generation, None


def test_pieces_of_a_prompt_in_two_steps_are_put_together() -> None:
    prompt, logits = [4, 1, 3], torch.randn(4, 6)  # positions 0 .. 3 of 3 prompt tokens and 2 new ones
    expected = logits.log_softmax(-1)
    collector = sides.Collector({"prompt": prompt, "top_ids": [[0, 5], [1, 2], [3, 4], [5, 0]]})
    collector.take(Piece((), logits[:2], None))
    collector.take(Piece((2,), logits[2:3], logits[2:3]))
    collector.take(Piece((5,), None, logits[3:]))
    said = compare.Answer(**collector.answer())
    assert list(said.tokens) == [2, 5]
    assert said.prompt_log_probs == pytest.approx([expected[0, 1].item(), expected[1, 3].item()], abs=1e-6)
    rows = expected.gather(1, torch.tensor([[0, 5], [1, 2], [3, 4], [5, 0]]))
    torch.testing.assert_close(torch.tensor(said.log_probs), rows)


# --- the verdict ---

# two prompt tokens, three new ones; the second new token has a close rival, 7
REFERENCE: dict[str, Any] = {
    "prompt": [1, 2],
    "tokens": [5, 6, 8],
    "top_ids": [[2, 9], [5, 9], [6, 7], [8, 9]],
    "log_probs": [[-0.5, -2.0], [-0.25, -3.0], [-1.0, -1.001], [-0.125, -4.0]],
    "prompt_log_probs": [-0.5],
}
RIGHT: dict[str, Any] = {key: REFERENCE[key] for key in ("tokens", "log_probs", "prompt_log_probs")}


def judged(answer: dict[str, Any], count: int = 1) -> dict[str, Any]:
    about = {
        "engine": {"engine": "torch", "world_size": 2, "trtllm_version": "0.8.0", "dtype": "float16"},
        "stored_dtype": "float16",
        "device": "cpu",
        "asked": {"prompts": count, "answer_tokens": 3, "top_k": 2},
    }
    tokenizer = Tokenizer(WordLevel({f"<{i}>": i for i in range(10)}, unk_token="<0>"))
    return build_verified.judged(
        about, ["a <b>"] * count, [REFERENCE] * count, [RIGHT] * (count - 1) + [answer], tokenizer
    )


def failed(report: dict[str, Any]) -> list[str]:
    return [check["name"] for check in report["checks"] if not check["passed"]]


def changed(position: int, value: float) -> dict[str, Any]:
    rows = [list(row) for row in REFERENCE["log_probs"]]
    rows[position][0] = value
    return {**RIGHT, "log_probs": rows}


def test_equal_answers_pass() -> None:
    report = judged(RIGHT)
    assert report["passed"] and report["greedy_tokens"] == {
        "asked": 3,
        "compared": 3,
        "equal": 3,
        "near_ties": 0,
        "turned": 0,
    }
    assert report["perplexity"]["hugging_face"] == pytest.approx(math.exp(0.5), rel=1e-3)


def test_a_near_tie_may_turn_and_what_follows_is_not_compared() -> None:
    other_text = {**changed(3, -9.0), "tokens": [5, 7, 1]}
    report = judged(other_text)
    assert report["passed"]
    assert report["greedy_tokens"] == {"asked": 3, "compared": 2, "equal": 1, "near_ties": 1, "turned": 0}


@pytest.mark.parametrize("tokens", [[9, 6, 8], [5, 6, 4], [5, 6]], ids=["known rival", "outside the top", "too short"])
def test_any_other_turn_fails_however_close_the_log_probabilities(tokens: list[int]) -> None:
    report = judged({**RIGHT, "tokens": tokens})
    assert failed(report)[0] == "greedy answers that differ, near ties apart"
    assert report["prompts"][0]["parted"]["near_tie"] is False


def test_one_large_difference_fails_and_is_named_first() -> None:
    report = judged(changed(3, -0.127), count=70)
    assert failed(report) == ["largest difference of a log probability"]
    assert report["prompts"][0]["worst"] == {"position": 3, "token": "<8>", "hugging_face": -0.125, "engine": -0.127}
    problem = reports.verifying.engine_differs("room/report.html", report, "build/x/engines").report()
    assert "-0.125 for" in " ".join(problem.split()) and "0.002, must be at most 0.001" in " ".join(problem.split())


def test_many_small_differences_fail_by_their_mean() -> None:
    shifted = [[value - 0.0005 for value in row] for row in REFERENCE["log_probs"]]
    assert failed(judged({**RIGHT, "log_probs": shifted})) == ["mean difference of a log probability"]


def test_an_answer_to_another_text_fails_by_perplexity() -> None:
    assert failed(judged({**RIGHT, "prompt_log_probs": [-0.6]})) == ["logarithm of the perplexities' ratio"]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_no_number_never_passes(value: float) -> None:
    report = judged({**changed(1, value), "prompt_log_probs": [value]})
    assert len(failed(report)) == 3
    json.loads(json.dumps(report, allow_nan=False))
    assert "not a number" in verified_report.page(report)


def test_too_little_compared_fails() -> None:
    """A model whose every second choice is a near tie proves nothing."""
    reference = compare.Reference((1,), (5,) * 8, ((5, 7),) * 8, ((-1.0, -1.0),) * 8, ())
    answer = compare.Answer((7,) * 8, reference.log_probs, ())
    found = compare.compare_answer(reference, answer, FLOAT32)
    verdict = compare.verdict([(reference, answer)], [found], FLOAT32)
    assert [check.name for check in verdict.checks if not check.passed] == ["share of the answers' tokens compared"]


def test_rounding_errors_leave_no_trace_in_the_report() -> None:
    """Two runs differ by some 1e-6; their reports are the same bytes."""
    noisy = [[value + 3e-6 * (-1) ** i for i, value in enumerate(row)] for row in REFERENCE["log_probs"]]
    one, two = judged(changed(2, -1.000002), count=3), judged({**RIGHT, "log_probs": noisy}, count=3)
    assert json.dumps(one) == json.dumps(two)


def test_the_page_shows_texts_as_text() -> None:
    assert "a &lt;b&gt;" in verified_report.page(judged(RIGHT))


@pytest.mark.parametrize("algo, expected", [("W8A16", "8 bits"), ("FP8", "8 bits"), ("W4A16_AWQ", "4 bits")])
def test_quantized_weights_have_thresholds_of_their_own(algo: str, expected: str) -> None:
    found = compare.coarsest("float16", "float16", on_gpu=True, quant_algo=algo)
    assert found == expected
    limits, bfloat16 = compare.thresholds(found), compare.thresholds("bfloat16")
    assert limits.log_prob > bfloat16.log_prob and limits.perplexity <= 0.1


@pytest.mark.parametrize(
    "stored, engine, on_gpu, expected",
    [
        ("float16", "float16", False, "float32"),
        ("bfloat16", "float32", False, "float32"),
        ("bfloat16", "float16", False, "float16"),
        ("float32", "bfloat16", False, "bfloat16"),
        ("float16", "float16", True, "float16"),
        ("bfloat16", "float16", True, "bfloat16"),
        ("float32", "float32", True, "float32"),
    ],
)
def test_thresholds_are_those_of_the_coarsest_arithmetic(stored: str, engine: str, on_gpu: bool, expected: str) -> None:
    assert compare.coarsest(stored, engine, on_gpu) == expected


# --- sides that fail ---


class Done:
    count = 0

    def update(self, count: int) -> None:
        self.count += count


def ask(code: str, folder: Path, done: Done) -> None:
    build_verified.ask("the engine", [sys.executable, "-c", code], {}, folder, done)


@pytest.mark.parametrize(
    "end, expected", [("sys.exit(3)", "ended with status 3"), ("os.kill(os.getpid(), 9)", "because memory ran out")]
)
def test_a_side_that_ends_early_is_a_report_with_its_last_lines(tmp_path: Path, end: str, expected: str) -> None:
    done = Done()
    with pytest.raises(reports.Problem) as caught:
        ask(f"import os, sys; print('asked 4'); print('no weights here', flush=True); {end}", tmp_path, done)
    said = " ".join(caught.value.report().split())
    assert expected in said and "no weights here" in said and "asked" not in said
    assert done.count == 4 and tmp_path.is_dir()


def test_a_side_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_verified, "SILENT_SECONDS", 1)
    code = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(100)"
    with pytest.raises(reports.Problem, match="does not answer") as caught:
        ask(code, tmp_path, Done())
    pid = caught.value.seen.split("pid ")[1].split()[0]
    assert not Path(f"/proc/{pid}").exists()


def test_a_missing_package_is_a_report_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(reports.Problem) as caught:
        build_verified.check_packages("torch", "0.8.0")
    assert caught.value.command.endswith("-r requirements/verify.txt")


def test_a_container_without_what_belongs_to_it_is_not_repaired_with_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorrt_llm" else 1)
    build_verified.check_packages("torch", "0.14.0")
    with pytest.raises(reports.Problem, match="tensorrt_llm") as caught:
        build_verified.check_packages("tensorrt", "0.14.0")
    assert caught.value.command.endswith("make doctor") and "0.14.0" in caught.value.seen


def test_both_kinds_of_engines_are_asked_by_one_process_per_rank(tmp_path: Path) -> None:
    for kind, module in (("torch", "scripts.verifying.sides"), ("tensorrt", "scripts.verifying.trtllm_side")):
        command = build_verified.engine_command(kind, Path("engines"), 4, tmp_path)
        assert command[0] == "mpirun" and command[command.index("-n") + 1] == "4"
        assert command[command.index("-m") + 1] == module and command[-1] == str(tmp_path / "answers.json")
