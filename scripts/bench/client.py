"""Streams over Triton's gRPC for `make bench`, if perf_analyzer does not run: one process, the official client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from scripts import reports


def ask(address: str, concurrency: int, count: int, max_tokens: int, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """`count` streamed requests, `concurrency` at a time; each in the form of ranks.request_times."""
    return asyncio.run(_ask(address, concurrency, count, max_tokens, prompts))


async def _ask(
    address: str, concurrency: int, count: int, max_tokens: int, prompts: Sequence[str]
) -> list[dict[str, Any]]:
    import tritonclient.grpc.aio as triton

    waiting, results = iter(range(count)), []
    async with triton.InferenceServerClient(address) as client:

        async def one(text: str) -> dict[str, Any]:
            inputs = []
            for name, kind, value in (
                ("text_input", "BYTES", np.array([[text.encode()]], dtype=object)),
                ("max_tokens", "INT32", np.array([[max_tokens]], dtype=np.int32)),
                ("end_id", "INT32", np.array([[-1]], dtype=np.int32)),
                ("stream", "BOOL", np.array([[True]])),
            ):
                inputs.append(triton.InferInput(name, [1, 1], kind))
                inputs[-1].set_data_from_numpy(value)

            async def requests() -> Any:
                yield {"model_name": "ensemble", "inputs": inputs, "enable_empty_final_response": True}

            began, arrivals = time.perf_counter(), []
            async for result, error in client.stream_infer(requests()):
                if error is not None:
                    raise reports.serving.request_refused(str(error))
                if result.get_response().outputs:
                    arrivals.append(time.perf_counter())
                if result.get_response().parameters["triton_final_response"].bool_param:
                    break
            tokens = [1] * len(arrivals)
            tokens[-1] += max_tokens - len(arrivals)
            return {"began": began, "arrivals": arrivals, "tokens": tokens}

        async def stream() -> None:
            for index in waiting:
                results.append(await one(prompts[index % len(prompts)]))

        await asyncio.gather(*(stream() for _ in range(concurrency)))
    return results
