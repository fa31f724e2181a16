"""What the READMEs show of curl and Python does what they say, typed as it stands but for ports and the model's name."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest
from project import ROOT
from server import Served, serve

READMES = ("README.md", "README.ko.md")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def chatting(tree: Path) -> Iterator[Served]:
    """The bundled model with a chat format: it answers whatever the examples ask of a bigger one."""
    running = serve(tree, "TP=1", "CHAT_TEMPLATE=models/llama-2.jinja")
    yield running
    assert running.end() == 0, "".join(running.lines)


def examples(readme: str) -> List[str]:
    """The indented blocks of a README that are curl commands or Python."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", (ROOT / readme).read_text(), re.MULTILINE)
    found = []
    for block in map(textwrap.dedent, blocks):
        python = re.search(r"^(import|from) ", block, re.MULTILINE)
        commands, program = (block[: python.start()], [block[python.start() :]]) if python else (block, [])
        # a command goes on where the next line is indented
        found += [*re.findall(r"^curl .*(?:\n +.*)*", commands, re.MULTILINE), *program]
    return found


EXAMPLES = [(readme, example) for readme in READMES for example in examples(readme)]


@pytest.mark.parametrize(
    ("readme", "example"), EXAMPLES, ids=[f"{readme}-{n}" for n, (readme, _) in enumerate(EXAMPLES)]
)
def test_the_example_answers(chatting: Served, readme: str, example: str) -> None:
    for shown, port in ((8000, chatting.http_port), (8001, chatting.grpc_port), (9000, chatting.openai_port)):
        example = example.replace(f"127.0.0.1:{shown}", f"127.0.0.1:{port}")
    example = example.replace("smollm2-135m", "stories")
    command = ["sh", "-c", example] if example.startswith("curl") else [sys.executable, "-c", example]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "error" in done.stdout) == (0, False), done.stdout + done.stderr
    assert len(done.stdout) > 20 and REPLACEMENT not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("readme", READMES)
def test_both_protocols_are_shown_with_curl_and_with_python(readme: str) -> None:
    def shown(example: str) -> Tuple[bool, bool]:
        return example.startswith("curl"), any(word in example for word in ("9000", "OpenAI"))

    assert {shown(example) for example in examples(readme)} == {(a, b) for a in (True, False) for b in (True, False)}
