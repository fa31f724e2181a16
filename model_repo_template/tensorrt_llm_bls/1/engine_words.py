"""What tensorrt_llm's errors mean. TensorRT-LLM gives all of them the code INTERNAL, and puts C++ files, lines and a
stack trace into the text (docker/contracts/backend-rules, the rules error-*). So the words tell whose fault an error
is, and a client sees one sentence.
"""

from __future__ import annotations

import re

# The request asks for what this engine or model does not do
AT_FAULT = re.compile(
    r"Prompt length \(\d+\) exceeds|Incorrect sampling config|Invalid size for tensor|Sparse list must|Invalid tensor name"
    r"|Streaming is only supported|Expected inputTokens tensors|is not present in the request|tensor not provided"
    r"|Batch size > 1 requires|expects requests with batch size of 1|need to build engine with gather|gather_generation_logits must be"
    r"|^unexpected inference (input|output)"
)
BUSY = re.compile(r"Maximum queue size of \d+ has been reached")
# What the engine says about a request that it had accepted, and what the backend says about its own answer
FAILED = re.compile(
    r"^(Executor failed process requestId|Encountered error for requestId|Error encountered while populating response)"
)
# A check of the executor before it accepts a request
CHECK = re.compile(r"^\[TensorRT-LLM\]\[ERROR\] Assertion failed: ")
NOT_FOR_CLIENTS = re.compile(
    r"(Executor failed process requestId \d+ due to the following error: |Encountered error for requestId \d+: "
    r"|Encountered an error when fetching new request: |\[TensorRT-LLM\]\[ERROR\] |Assertion failed: )"
    r"|\s*\([^()\s]*[^()\s:]:\d+\)|\.?\s*Set log level to info.*"
)


def told(message: str, is_refusal: bool) -> tuple[str, str]:
    """(the name of a Triton code, one sentence for the client). is_refusal: the code said so."""
    first = message.split("\n", 1)[0].strip()
    text = NOT_FOR_CLIENTS.sub("", first).strip() or "the engine failed; the server's log says more"
    if BUSY.search(first):
        return "UNAVAILABLE", text
    if is_refusal or AT_FAULT.search(first) or (CHECK.search(first) and not FAILED.search(first)):
        return "INVALID_ARG", text
    return "INTERNAL", text
