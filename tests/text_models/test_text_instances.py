"""Text is the same with any number of instances of the text models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from project import copy_of_project
from server import Served, end_tree_of, serve
from triton_requests import PROMPT, PROMPTS, Stream, assert_frees_its_slot, infer, tell

from scripts.serving.triton_client import ints, texts, yes


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """TP=1, three instances of each text model."""
    tree = copy_of_project(tmp_path_factory.mktemp("instances") / "tree")
    for model in ("ensemble", "tensorrt_llm_bls", "preprocessing", "postprocessing"):
        config = tree / "model_repo_template" / model / "config.pbtxt"
        text = config.read_text().replace("instance_count}", "}").replace("count: ${bls_}", "count: 3")
        config.write_text(
            text.replace("count: ${preprocessing_}", "count: 3").replace("count: ${postprocessing_}", "count: 3")
        )
    running = serve(tree, "TP=1")
    try:
        yield running
        assert running.end() == 0, "".join(running.lines)
    finally:
        end_tree_of(running.process)


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_every_stream_is_in_order(several: Served, model: str) -> None:
    alone = {prompt: tell(several, model, prompt=prompt, max_tokens=40) for prompt in PROMPTS}
    together: dict[str, str] = {str(n): "" for n in range(48)}
    with closing(Stream(several)) as stream:
        for n in range(48):
            stream.send(model, str(n), text_input=texts(PROMPTS[n % 8]), max_tokens=ints(40), stream=yes())
        for _ in range(48):
            for answer in stream.until_final():
                together[answer.get_response().id] += answer.as_numpy("text_output").item().decode()
    assert together == {str(n): alone[PROMPTS[n % 8]] for n in range(48)}


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_a_stop_word_and_a_client_that_leaves_end_the_work(several: Served, model: str) -> None:
    def stop(_: object) -> None:
        told = tell(several, model, max_tokens=450, stop_words=texts("age surr"), end_id=ints(-1))
        assert told == ", in a small vill"

    def leave(begun: Callable[[], None]) -> None:
        stream = Stream(several)
        stream.send(model, text_input=texts(PROMPT), max_tokens=ints(450), end_id=ints(-1), stream=yes())
        begun()
        stream.close(cancel=True)

    assert_frees_its_slot(several, stop)
    assert_frees_its_slot(several, leave)


def test_what_tensorrt_llm_refuses_is_said_by_both(several: Served) -> None:
    for model in ("ensemble", "tensorrt_llm_bls"):
        answer = several.post(model, text_input=PROMPT, max_tokens=5, beam_width=2)
        assert (answer["status"], answer["error"]) == (400, "beam_width is 2; this engine supports only 1")


def test_a_batch_of_prompts_gets_the_ids_that_each_gets_alone(several: Served) -> None:
    """Rows are padded at the end; each row has its own request."""
    n, limits = len(PROMPTS), ints(*range(1, len(PROMPTS) + 1)).reshape(-1, 1)
    stops = texts(*(prompt[:3] for prompt in PROMPTS)).reshape(-1, 1)
    queries = texts(*PROMPTS).reshape(-1, 1)
    together = infer(several, "preprocessing", QUERY=queries, REQUEST_OUTPUT_LEN=limits, STOP_WORDS_DICT=stops)
    for row in range(n):
        alone = infer(
            several,
            "preprocessing",
            QUERY=queries[row : row + 1],
            REQUEST_OUTPUT_LEN=limits[row : row + 1],
            STOP_WORDS_DICT=stops[row : row + 1],
        )
        for name, value in alone.items():
            ours = together[name][row]
            assert ours[..., : value.shape[-1]].tolist() == value[0].tolist(), name
            padding = ours[..., value.shape[-1] :]
            assert set(padding.reshape(-1).tolist()) <= {0, -1, 2}, name
