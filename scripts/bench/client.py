"""Streams over Triton's gRPC for `make bench`, if perf_analyzer does not run: one process, the official client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from scripts import reports


def ask(address: str, concurrency: int, count: int, max_tokens: int, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """`count` streamed requests, `concurrency` at a time; each in the form of ranks.request_times."""
    return asyncio.run(_ask(address, concurrency, count, max_tokens, prompts))


async def _ask(
    address: str, concurrency: int, count: int, max_tokens: int, prompts: Sequence[str]
) -> list[dict[str, Any]]:
    import tritonclient.grpc.aio as triton

    from scripts.serving.triton_client import NO_PROXY, inputs_of, ints, is_final, texts, yes

    waiting, results = iter(range(count)), []
    async with triton.InferenceServerClient(address, channel_args=NO_PROXY) as client:

        async def one(text: str) -> dict[str, Any]:
            asked = {"text_input": texts(text), "max_tokens": ints(max_tokens), "end_id": ints(-1), "stream": yes()}
            inputs = inputs_of(asked)

            async def requests() -> Any:
                yield {"model_name": "ensemble", "inputs": inputs, "enable_empty_final_response": True}

            began, arrivals = time.perf_counter(), []
            async for result, error in client.stream_infer(requests()):
                if error is not None:
                    raise reports.serving.request_refused(str(error))
                if result.get_response().outputs:
                    arrivals.append(time.perf_counter())
                if is_final(result):
                    break
            tokens = [1] * len(arrivals)
            tokens[-1] += max_tokens - len(arrivals)
            return {"began": began, "arrivals": arrivals, "tokens": tokens}

        async def stream() -> None:
            for index in waiting:
                results.append(await one(prompts[index % len(prompts)]))

        await asyncio.gather(*(stream() for _ in range(concurrency)))
    return results
