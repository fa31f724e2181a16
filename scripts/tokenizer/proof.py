"""Opens a tokenizer folder as the server will: the same code reads the same files, before they go into a room."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts import reports
from scripts.weights.bounded import bounded

TEXT = Path(__file__).parents[2] / "model_repo_template/tensorrt_llm_bls/1/text.py"
# The endpoint's module. It is not imported by name, because the room's content does not depend on it, and only the
# endpoint's packages have Jinja.
TEMPLATES = "scripts.openai", "chat_template"
# Limits of CPU time and of memory, for one conversation of one word;
# the endpoint gives a template 2 s and goes on without it
TEMPLATE_SECONDS = 10
ONE_WORD_SECONDS = 0.1
TEMPLATE_BYTES = 1 << 30
SAMPLE = "Hello, 안녕 0123 \t\n x\N{REPLACEMENT CHARACTER}"
HELLO = [{"role": "user", "content": "Hello"}]
# what the child ends with
UNREADABLE, UNBOUNDED, TOKENIZER_UNREADABLE = 3, 4, 5


def open_as_served(files: Mapping[str, bytes], source: Callable[[str], Path], vocab_size: int = 1 << 31) -> None:
    """A Problem if the server could not open these files, or if a text becomes ids that the embedding has no row for.

    files: name -> content; source: name -> the user's file that it came from.
    """
    for name, data in files.items():
        if name.endswith(".json"):
            check_json(source(name), data)
    with tempfile.TemporaryDirectory(prefix="config-") as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        text = _opened(source("tokenizer.json"), lambda: _text_code().Text(Path(folder)))
        most = max(_opened(source("tokenizer.json"), lambda: text.encode([SAMPLE])[0]), default=0)
        if most >= vocab_size:
            raise reports.weights.vocabulary_differs(source("tokenizer.json"), most + 1, vocab_size)
        _try_template(Path(folder), text, source)


def check_json(path: Path, data: bytes) -> None:
    """A Problem unless the bytes are a JSON object in UTF-8: the server reads no other encoding."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise reports.weights.weights_unreadable(path, f"no JSON in UTF-8 ({error})") from None
    if not isinstance(value, dict):
        raise reports.weights.weights_unreadable(path, f"a JSON {type(value).__name__}, not an object")


def _text_code() -> Any:
    spec = importlib.util.spec_from_file_location("text_as_served", TEXT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _try_template(folder: Path, text: Any, source: Callable[[str], Path]) -> None:
    """Compiles the chat template and writes one conversation. This runs in a child,
    because one operation may take for ever.

    Jinja computes constants while it compiles.
    """
    path = source("chat_template.jinja" if (folder / "chat_template.jinja").is_file() else "tokenizer_config.json")
    if not importlib.util.find_spec(
        "jinja2"
    ):  # a container without the endpoint's packages: the endpoint reports a bad template
        return
    code = importlib.import_module(".".join(TEMPLATES))
    template = _opened(path, lambda: code.template_of(folder))
    if template is None:
        return
    said, tokenizer = folder / "said", source("tokenizer.json")

    def write() -> int:
        try:
            made = _opened(path, lambda: (made := code.ChatTemplate(template, folder, text), made.template)[0])
        except reports.Problem as problem:
            try:  # the template's code opens the tokenizer, too
                _opened(
                    tokenizer,
                    lambda: importlib.import_module("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json")),
                )
            except reports.Problem as of_tokenizer:
                said.write_text(of_tokenizer.seen)
                return TOKENIZER_UNREADABLE
            said.write_text(problem.seen)
            return UNREADABLE
        started = time.process_time()
        try:
            made.render(HELLO)
        except code.Refused as refused:  # a template may require more than one word of a user
            if isinstance(refused.__context__, MemoryError):
                return UNBOUNDED
        # the endpoint gives up after 2 s of a clock; on a busy machine that is less CPU time
        return UNBOUNDED if time.process_time() - started > ONE_WORD_SECONDS else 0

    try:
        status = bounded(write, path, TEMPLATE_SECONDS, TEMPLATE_BYTES)
    except reports.Problem:
        status = UNBOUNDED
    if status in (UNREADABLE, TOKENIZER_UNREADABLE):
        raise reports.weights.unopened(path if status == UNREADABLE else tokenizer, said.read_text())
    if status:
        raise reports.weights.template_unbounded(path)


def _opened(path: Path, opening: Callable[[], Any]) -> Any:
    """What `opening` gives; a Problem that names the file if it fails in any way,
    also by a panic of the tokenizers' Rust."""
    try:
        with _quiet():
            return opening()
    except (reports.Problem, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        said = f"The server could not open {path.name} ({type(error).__name__}: {error})."
        raise reports.weights.unopened(path, said) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """A panic in Rust writes to file descriptor 2 before it becomes an exception."""
    sys.stderr.flush()
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
