"""The endpoint itself: routes, errors in OpenAI's shape, bounds on what a client may take. docs of its paths: /openapi.json."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, AsyncIterator, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Type, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.openai import messages
from scripts.openai.answers import Choice, Job, Part
from scripts.openai.chat_template import ChatTemplate, Refused
from scripts.openai.engine import Engine, EngineFailed, Question

log = logging.getLogger("openai")

PAGE = Path(__file__).with_name("page.html")
# the page's Markdown parser, as it is published; vendored/get.sh takes it
MARKDOWN = PAGE.parent / "vendored" / "markdown-it.umd.min.js"
# A body is at most what a prompt can be in JSON, where a character may take six bytes, within these; and all that are being read, together
LEAST_BODY_BYTES, MOST_BODY_BYTES, MAX_BODIES_BYTES = 256 << 10, 4 << 20, 64 << 20
BODY_SECONDS = 30
# Requests that may wait for a slot of the engine, for each slot that it has
WAITING_PER_SLOT = 8
# How long a client may take to read what it was sent, before it counts as gone
READ_SECONDS = 60
# /health: a token younger than this, or one that comes within this
HEALTH_SECONDS = 5.0
# Longer texts are tokenized in a thread: the loop stays with the streams (70 microseconds for 500 characters)
INLINE_CHARACTERS = 4000
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

Body = TypeVar("Body", bound=messages.Sampling)


class ApiError(Exception):
    """What the client learns, as OpenAI puts it."""

    def __init__(
        self, status: int, message: str, param: Optional[str] = None, code: Optional[str] = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def body(self) -> Dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JSONResponse(self.body, self.status, self.headers)


def failed(error: EngineFailed) -> ApiError:
    """An engine's failure as the client sees it; details are in the log."""
    if error.unavailable:
        return ApiError(
            503, "the model server does not answer; it may be starting or ending", code="unavailable", Retry_After="2"
        )
    return ApiError(500, "the engine could not serve the request; the server's log says more", code="engine_error")


def invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body, in words that never repeat what was sent at length."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    # Of several forms that a value may have, the one that it has is told of: not "it is no text" of a list with a mistake in it.
    same = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    first = next((one for one in same if not one["type"].endswith("_type")), found[0])
    # the names of pydantic's own alternatives (str, list[str]) are no names of the API
    names = [part for part in first["loc"] if not isinstance(part, str) or re.fullmatch(r"(?!str$)[a-z_]+", part)]
    param = ".".join(map(str, names)) or None
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])[:64]
        return ApiError(400, f"Unrecognized request argument supplied: {name}", param)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg'].partition(': ')[2] or first['msg']}")
    if first["msg"].startswith("List should have at most 0 items"):
        return ApiError(400, f"{param} is not supported", param)
    if not first["loc"]:
        return ApiError(400, "the body must be a JSON object")
    return ApiError(400, f"{param}: {first['msg']}", param)


class Endpoint:
    """Everything that the routes share.

    name: the model's id; text: Text of the room's tokenizer; stops: its StopStrings; template: None for a base model.
    """

    def __init__(
        self, name: str, engine: Engine, text: Any, stops: Callable[[Sequence[str]], Any], template: Optional[ChatTemplate],
        end_ids: Sequence[int] = (), keys: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.name, self.engine, self.text, self.stops, self.template = name, engine, text, stops, template
        self.end_ids, self.keys = list(end_ids), [key.encode() for key in keys]
        self.limits = engine.limits
        self.capacity = self.limits.max_batch_size * (1 + WAITING_PER_SLOT)
        self.in_progress = 0
        self.max_prompt_bytes = self.limits.max_input_len * text.longest_piece_bytes
        longest = 8 * max(self.max_prompt_bytes, 12 * self.limits.max_input_len)
        self.max_body_bytes = min(MOST_BODY_BYTES, max(LEAST_BODY_BYTES, longest))
        self.created = int(time.time())
        self.probe: Optional[asyncio.Task[bool]] = None
        page = PAGE.read_text("utf-8").replace(f"@{MARKDOWN.name}@", MARKDOWN.read_text("utf-8"))
        self.page = page.encode()
        self.page_policy = content_security_policy(page)

    # --- routes ---

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        """Healthy: a token came out of all ranks a moment ago, or comes now. One question is asked however many ask us."""
        now = asyncio.get_running_loop().time()
        if now - self.engine.last_token > HEALTH_SECONDS:
            if self.probe is None or self.probe.done():
                self.probe = asyncio.ensure_future(self._answers())
            if not await asyncio.shield(self.probe):
                raise ApiError(503, f"no token came out of the engine within {HEALTH_SECONDS:.0f} s", code="unhealthy")
        return JSONResponse({"status": "ok", "requests": self.in_progress, "slots": self.limits.max_batch_size})

    async def alive(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def show_page(self, request: Request) -> Response:
        return HTMLResponse(
            self.page, headers={"Content-Security-Policy": self.page_policy, "Cache-Control": "no-cache"}
        )

    async def description(self, request: Request) -> Response:
        return JSONResponse(DESCRIPTION)

    async def completions(self, request: Request) -> Response:
        body = await read(request, messages.CompletionRequest)
        self._check_model(body.model)
        for name in ("suffix", "best_of"):
            if getattr(body, name) not in (None, "", body.n or 1):
                raise ApiError(400, f"{name} is not supported", name)
        if body.logprobs:
            raise ApiError(
                400, "logprobs: this server knows the log probability of the chosen tokens only; ask for 0", "logprobs"
            )
        if body.echo and body.logprobs is not None:
            raise ApiError(
                400, "echo with logprobs is not supported: the prompt's log probabilities are not known", "logprobs"
            )
        prompts, shown = await self._prompts(body)
        job = self._start(body, prompts, body.max_tokens or 16, chat=False, logprobs=body.logprobs is not None)
        for n, choice in enumerate(job.choices):
            choice.prefix = shown[n // (body.n or 1)] if body.echo else ""
        return self._answer(body, job)

    async def chat(self, request: Request) -> Response:
        body = await read(request, messages.ChatRequest)
        self._check_model(body.model)
        if self.template is None:
            raise ApiError(
                400, "this model has no chat template: it is a base model. Use /v1/completions, or serve it with CHAT_TEMPLATE=",
                "messages", "no_chat_template",
            )  # fmt: skip
        if body.top_logprobs:
            raise ApiError(
                400,
                "top_logprobs: this server knows the log probability of the chosen tokens only; ask for 0",
                "top_logprobs",
            )
        turns = []
        for message in body.messages:
            role = "system" if message.role == "developer" else message.role
            turns.append({"role": role, "content": message.text, **({"name": message.name} if message.name else {})})
        size = sum(len(turn["content"].encode()) for turn in turns)
        self._check_bytes(size, "messages")
        try:
            # the template is the model's: whatever it does, others are served meanwhile
            ids = await asyncio.to_thread(self.template.token_ids, turns)
        except Refused as refusal:
            raise ApiError(400, str(refusal)[:500], "messages") from None
        self._check_ids(ids, "messages")
        left = self.limits.max_seq_len - len(ids)
        job = self._start(
            body, [ids], body.max_completion_tokens or body.max_tokens or left, chat=True, logprobs=bool(body.logprobs)
        )
        for choice in job.choices:
            choice.starts_with_space = self.text.adds_space
        return self._answer(body, job)

    # --- what they do ---

    async def _prompts(self, body: messages.CompletionRequest) -> Tuple[List[List[int]], List[str]]:
        """Token ids of every prompt, and its text for echo."""
        one = isinstance(body.prompt, str) or isinstance(next(iter(body.prompt), None), int)
        given: List[Any] = [body.prompt] if one else list(body.prompt)
        if not given:
            raise ApiError(400, "prompt is empty", "prompt")
        if len(given) * (body.n or 1) > self.capacity:
            raise ApiError(
                400,
                f"{len(given)} prompts with n={body.n or 1}; this server takes at most {self.capacity} answers a request",
                "prompt",
            )
        texts = [prompt for prompt in given if isinstance(prompt, str)]
        for text in texts:
            self._check_bytes(len(text.encode()), "prompt")
        encoded = iter(await self._apart(sum(map(len, texts)), self.text.encode, texts))
        prompts = [next(encoded) if isinstance(prompt, str) else prompt for prompt in given]
        for ids in prompts:
            self._check_ids(ids, "prompt")
        shown = (
            [prompt if isinstance(prompt, str) else self.text.decode(prompt) for prompt in given] if body.echo else []
        )
        return prompts, shown

    def _start(
        self, body: messages.Sampling, prompts: Sequence[List[int]], max_tokens: int, chat: bool, logprobs: bool
    ) -> Job:
        """Hand every prompt to the engine, n times. Raises ApiError when it cannot be, or when too many are there already."""
        n = body.n or 1
        if body.stream_options and not body.stream:
            raise ApiError(400, "stream_options is only allowed with stream", "stream_options")
        for ids in prompts:
            if len(ids) + max_tokens > self.limits.max_seq_len:
                raise ApiError(
                    400, f"This model's maximum context length is {self.limits.max_seq_len} tokens; the prompt has {len(ids)} and the "
                    f"answer may have {max_tokens}.", "messages" if chat else "prompt", "context_length_exceeded",
                )  # fmt: skip
        count = len(prompts) * n
        if count > self.capacity:
            raise ApiError(400, f"n is {n}; this server takes at most {self.capacity} answers a request", "n")
        if self.in_progress + count > self.capacity:
            raise ApiError(
                429,
                f"{self.in_progress} requests are in progress or waiting; try again",
                code="rate_limit_exceeded",
                Retry_After="1",
            )
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        for token in bias:
            if token >= self.limits.vocab_size:
                raise ApiError(
                    400, f"logit_bias: {token} is no token id; they go to {self.limits.vocab_size - 1}", "logit_bias"
                )
        seed = body.seed if body.seed is not None else uuid.uuid4().int
        stops = [stop for stop in body.stops if stop]
        question = Question(
            [], max_tokens, _or(body.temperature, 1.0), _or(body.top_p, 1.0), body.top_k or 0, body.presence_penalty or 0.0,
            body.frequency_penalty or 0.0, _or(body.repetition_penalty, 1.0), 0, body.min_tokens or 0, logprobs, bias,
        )  # fmt: skip
        usage = bool(body.stream_options and body.stream_options.include_usage)
        job = Job(self.name, chat, [], sum(map(len, prompts)), logprobs, usage)
        # where the engine streams we see a stop string ourselves, however it is spelt
        spelt = [self.text.word_list(stops, ids) if stops and not self.engine.streams else None for ids in prompts]
        try:
            for number in range(count):
                ids, words = prompts[number // n], spelt[number // n]
                asked = replace(question, ids=ids, seed=(seed + number) % (1 << 64), stop_words=words)
                stream = self.engine.ask(asked, job.changed.set)
                job.choices.append(Choice(number, stream, self.text, self.stops(stops), max_tokens, self.end_ids))
        except BaseException:
            job.cancel()
            raise
        self.in_progress += count
        job.ended = lambda: self._ended(count)
        return job

    def _ended(self, count: int) -> None:
        self.in_progress -= count

    def _answer(self, body: messages.Sampling, job: Job) -> Response:
        return Streamed(job) if body.stream else Whole(job)

    async def _apart(self, size: int, function: Callable[..., Any], *args: Any) -> Any:
        """A function's result, in a thread where it takes long."""
        return await asyncio.to_thread(function, *args) if size > INLINE_CHARACTERS else function(*args)

    async def _answers(self) -> bool:
        """Whether a token comes out of the engine in time."""
        changed = asyncio.Event()
        stream = self.engine.ask(Question([self.text.bos_id or 0], 1, temperature=0), changed.set)
        try:
            await asyncio.wait_for(changed.wait(), HEALTH_SECONDS)
            return stream.failure is None
        except asyncio.TimeoutError:
            return False
        finally:
            stream.cancel()

    def _model(self) -> Dict[str, Any]:
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "trtllm-bake",
            "max_model_len": self.limits.max_seq_len, "has_chat_template": self.template is not None,
        }  # fmt: skip

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404,
                f"The model `{name[:64]}` does not exist; this server has `{self.name}`",
                "model",
                "model_not_found",
            )

    def _check_bytes(self, size: int, param: str) -> None:
        if size > self.max_prompt_bytes:
            raise ApiError(
                400, f"{param} has {size} bytes; the {self.limits.max_input_len} tokens that this model takes spell at most "
                f"{self.max_prompt_bytes}", param, "context_length_exceeded",
            )  # fmt: skip

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        if not ids:
            raise ApiError(400, f"{param} is empty", param)
        if len(ids) > self.limits.max_input_len:
            raise ApiError(
                400,
                f"{param} has {len(ids)} tokens; this model takes at most {self.limits.max_input_len}",
                param,
                "context_length_exceeded",
            )
        wrong = next((token for token in ids if not 0 <= token < self.limits.vocab_size), None)
        if wrong is not None:
            raise ApiError(
                400, f"{param}: {str(wrong)[:20]} is no token id; they go from 0 to {self.limits.vocab_size - 1}", param
            )


def _or(value: Optional[float], default: float) -> float:
    return default if value is None else value


async def read(request: Request, kind: Type[Body]) -> Body:
    """The body of a request, checked. Raises ApiError."""
    try:
        data = await asyncio.wait_for(request.body(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS} s") from None
    except ClientDisconnect:  # nobody reads this
        raise ApiError(400, "the body was cut off") from None
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # a page of another site can send anything else without being asked for permission
        raise ApiError(400, "the Content-Type must be application/json")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise invalid(error) from None


# --- answers as ASGI responses ---------------------------------------------------------------------------------------


class JobResponse(Response):
    """Runs a job to its end, or until its client has left: then nothing of it goes on running."""

    # by whose clock a client that reads nothing is found (see `watch_readers`)
    open: "set[JobResponse]" = set()

    def __init__(self, job: Job) -> None:
        self.job, self.background = job, None
        self.sending_since: Optional[float] = None
        self.task: Optional[asyncio.Task[Any]] = None
        self.left = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.task = asyncio.current_task()
        watching = asyncio.ensure_future(self._watch(receive))
        JobResponse.open.add(self)
        try:
            await self.run(send)
        finally:
            JobResponse.open.discard(self)
            watching.cancel()
            self.job.cancel()
            self.job.ended()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left = True
        self.job.changed.set()

    async def news(self) -> bool:
        """Wait for some; False when the client has left. Raises ApiError when the engine fails."""
        await self.job.changed.wait()
        self.job.changed.clear()
        if (failure := self.job.failure) is not None:
            raise failed(failure)
        return not self.left

    async def run(self, send: Send) -> None:
        raise NotImplementedError


class Whole(JobResponse):
    """The answer in one piece."""

    async def run(self, send: Send) -> None:
        job = self.job
        parts: List[List[Part]] = [[] for _ in job.choices]
        while not job.done:
            if not await self.news():
                return
            for own, choice in zip(parts, job.choices):
                own.append(choice.take())
        body = json.dumps(job.whole(parts), ensure_ascii=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Streamed(JobResponse):
    """The answer as server-sent events, as it comes; what is ready goes out together."""

    async def run(self, send: Send) -> None:
        job = self.job
        # The status says whether it works: it waits for the first token, or for the reason why there is none.
        events = job.opening()
        if not job.done and not await self.news():
            return
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while True:
            events += job.events()
            if job.done:
                events += job.closing()
            if events:
                self.sending_since = asyncio.get_running_loop().time()
                await send({"type": "http.response.body", "body": events, "more_body": not job.done})
                self.sending_since, events = None, b""
            if job.done:
                return
            try:
                if not await self.news():
                    return
            except ApiError as error:
                body = b"data: " + json.dumps(error.body).encode() + b"\n\n"
                await send({"type": "http.response.body", "body": body})
                return


async def watch_readers() -> None:
    """Ends answers whose client has read nothing for READ_SECONDS."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(READ_SECONDS / 12)
        for response in list(JobResponse.open):
            if (
                response.sending_since is not None
                and loop.time() - response.sending_since > READ_SECONDS
                and response.task
            ):
                response.task.cancel()


# --- around the routes -----------------------------------------------------------------------------------------------


class Door:
    """Outermost: request ids, the API key, and how much all bodies together may hold."""

    def __init__(self, app: ASGIApp, keys: Sequence[bytes], max_body_bytes: int) -> None:
        self.app, self.keys, self.max_body_bytes, self.held = app, keys, max_body_bytes, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else "req-" + uuid.uuid4().hex
        held = 0
        unread = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                # what is left of a body without end would be read for ever
                extra += [(b"connection", b"close")] if unread else []
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            try:
                await send(message)
            except RuntimeError as error:  # uvloop's, of a connection that its client has closed
                if "closed" not in str(error):
                    raise

        async def bounded() -> Message:
            nonlocal held, unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            size = len(message.get("body", b""))
            held += size
            self.held += size
            if held > self.max_body_bytes:
                raise ApiError(413, f"the body is larger than {self.max_body_bytes} bytes")
            if self.held > MAX_BODIES_BYTES:
                raise ApiError(
                    429, "too many large requests at once; try again", code="rate_limit_exceeded", Retry_After="1"
                )
            return message

        try:
            if scope["path"].startswith("/v1") and self.keys and not self._knows(headers.get(b"authorization", b"")):
                raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key", WWW_Authenticate="Bearer")
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length[:20]) > self.max_body_bytes:
                raise ApiError(413, f"the body is larger than {self.max_body_bytes} bytes")
            await self.app(scope, bounded, named)
        except ApiError as error:
            if error.status == 413:
                await self._discard(receive)
            await error.response()(scope, receive, named)
        finally:
            self.held -= held

    async def _discard(self, receive: Receive) -> None:
        """Most clients read no answer before all is sent: of a body that is somewhat too large the rest is let run out."""
        left = 4 * MOST_BODY_BYTES
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        more = True
        while more and left > 0 and (seconds := deadline - asyncio.get_running_loop().time()) > 0:
            try:
                message = await asyncio.wait_for(receive(), seconds)
            except asyncio.TimeoutError:
                return
            left -= len(message.get("body", b""))
            more = message.get("more_body", False)

    def _knows(self, authorization: bytes) -> bool:
        kind, _, given = authorization.partition(b" ")
        # every key is compared, each in constant time
        found = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        return kind.lower() == b"bearer" and any(found)


def _told(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return error.response()
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        if error.status_code == 404:
            message = f"Unknown request URL: {request.method} {request.url.path[:100]}"
        elif error.status_code == 405:
            message = f"Not allowed to {request.method} on {request.url.path[:100]} (allowed: {headers.get('Allow', 'nothing')})"
        else:
            message = str(error.detail)
        return ApiError(
            error.status_code, message, None, "unknown_url" if error.status_code == 404 else None, **headers
        ).response()
    return ApiError(500, "The server had an error; its log says more", code="internal_error").response()


def content_security_policy(page: str) -> str:
    """Only what stands in the page itself: its script and style by their hashes; it may ask this server, nothing else."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return (
            " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)
            or "'none'"
        )

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def application(endpoint: Endpoint) -> ASGIApp:
    """The ASGI app."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.ensure_future(watch_readers())
        yield
        watching.cancel()
        await endpoint.engine.close()

    routes = [
        Route("/v1/models", endpoint.models),
        Route("/v1/models/{model:path}", endpoint.model),
        Route("/v1/completions", endpoint.completions, methods=["POST"]),
        Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
        Route("/health", endpoint.health),
        Route("/health/live", endpoint.alive),
        Route("/openapi.json", endpoint.description),
        Route("/", endpoint.show_page),
    ]
    handlers: Dict[Any, Any] = {ApiError: _told, HTTPException: _told, Exception: _told}
    return Starlette(
        routes=routes,
        exception_handlers=handlers,
        lifespan=lifespan,
        middleware=[Middleware(Door, keys=endpoint.keys, max_body_bytes=endpoint.max_body_bytes)],
    )


# --- the description -------------------------------------------------------------------------------------------------


def _description() -> Dict[str, Any]:
    """OpenAPI 3.1, its schemas from messages.py."""
    kinds = [
        (messages.CompletionRequest, "validation"), (messages.ChatRequest, "validation"), (messages.Completion, "serialization"),
        (messages.ChatCompletion, "serialization"), (messages.Models, "serialization"), (messages.Model, "serialization"),
        (messages.Health, "serialization"), (messages.Error, "serialization"),
    ]  # fmt: skip
    names, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    errors = {
        "400": "The request is not valid, or asks for what is not supported", "401": "The API key is not known",
        "404": "There is no such model", "408": "The body came too slowly", "413": "The body is too large",
        "429": "Too many requests are in progress or waiting", "500": "The engine failed", "503": "The engine is not there",
    }  # fmt: skip

    def content(kind: Type[BaseModel], mode: str = "serialization") -> Dict[str, Any]:
        return {"application/json": {"schema": names[kind, mode]}}  # type: ignore[index]

    def operation(summary: str, answer: Dict[str, Any], statuses: Sequence[str], **more: Any) -> Dict[str, Any]:
        told = {status: {"description": errors[status], "content": content(messages.Error)} for status in statuses}
        return {
            "summary": summary,
            "responses": {"200": {"description": "The answer", "content": answer}, **told},
            **more,
        }

    def question(summary: str, body: Type[BaseModel], answer: Type[BaseModel]) -> Dict[str, Any]:
        # of each event: a chunk as JSON, or [DONE]
        event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
        given = {"required": True, "content": content(body, "validation")}
        streamed = {**content(answer), "text/event-stream": {"schema": event}}
        return {"post": operation(summary, streamed, list(errors), requestBody=given)}

    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    models = operation("The model", content(messages.Models), ["401"])
    model = operation("One model", content(messages.Model), ["401", "404"], parameters=[name])
    health = operation("Whether tokens come out of the engine", content(messages.Health), ["503"])
    page = operation("A page to try the model", {"text/html": {"schema": {"type": "string"}}}, [])
    return {
        "openapi": "3.1.0",
        "info": {"title": "trtllm-bake", "version": "1", "description": "OpenAI's API for the model that is served"},
        "paths": {
            "/v1/models": {"get": models},
            "/v1/models/{model}": {"get": model},
            "/v1/completions": question("Continue a text", messages.CompletionRequest, messages.Completion),
            "/v1/chat/completions": question("Answer a conversation", messages.ChatRequest, messages.ChatCompletion),
            "/health": {"get": health},
            "/": {"get": page},
        },
        "components": {"schemas": schemas["$defs"], "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


DESCRIPTION = _description()
