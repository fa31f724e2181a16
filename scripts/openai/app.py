"""The endpoint itself, an ASGI application: paths, keys, shares, answers.
What its paths take and give is at /openapi.json."""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.openai import passing
from scripts.openai.answers import Choice, Job, Part
from scripts.openai.desk import Desk
from scripts.openai.engine import TOKENS, Engine, EngineFailed, Question, inputs_of
from scripts.openai.front import Front
from scripts.openai.keys import Key, Keys
from scripts.openai.log import client_of_request, requests
from scripts.openai.metrics import Page, route_of
from scripts.openai.reader import Asked
from scripts.openai.shares import BODIES, PLACES, REQUESTS, Shares
from scripts.openai.tools import Calls
from scripts.openai.wrong import ApiError, busy

if TYPE_CHECKING:  # it is loaded only with TRACES=on
    from scripts.openai.tracing import Traces

log = logging.getLogger("openai")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

PAGE = Path(__file__).with_name("page.html")
# the page's Markdown parser, as published; vendored/get.sh fetches it
MARKDOWN = PAGE.parent / "vendored" / "markdown-it.umd.min.js"
# The largest body is the longest prompt in JSON, where a character may take six bytes, but within these limits
LEAST_BODY_BYTES, MOST_BODY_BYTES = 256 << 10, 4 << 20
# Bytes of all bodies that are being read, and of those of one client
MAX_BODIES_BYTES, MAX_BODIES_BYTES_OF_ONE = 64 << 20, 16 << 20
BODY_SECONDS = 30
# Answers of one client that may wait, per slot of the engine; and how many clients may have that many
WAITING_PER_SLOT, CLIENTS = 8, 4
# /health: a token younger than this, or one that comes within this
HEALTH_SECONDS = 5.0
# How often the file of keys is checked for changes
REFRESH_SECONDS = 1.0
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Routes whose good answers have no line in LOG=json: probes and scrapes
UNLOGGED = ("/health", "/health/live", "/metrics")
# what a page of another origin may send, if it may ask at all
ASKED_HEADERS = re.compile(r"[A-Za-z0-9, -]{1,1024}")
NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Options:
    """The operator's choices. aliases: other names of the model; origins: whose pages may ask (`any`: all); traces:
    makes a worker's traces, None for none."""

    aliases: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    traces: type[Traces] | None = None


def capacity_of(max_batch_size: int) -> int:
    """How many answers of one client may run and wait."""
    return max_batch_size * (1 + WAITING_PER_SLOT)


def failed(error: EngineFailed) -> ApiError:
    """The client's view of an engine's failure; details are in the log."""
    if error.unavailable:
        return ApiError(
            503, "the model server does not answer; it may be starting or ending", code="unavailable", Retry_After="2"
        )
    return ApiError(500, "the engine could not serve the request; the server's log says more", code="engine_error")


def ending() -> ApiError:
    return ApiError(
        503, "the server is ending and cut this answer off; ask again", code="server_ending", Retry_After="2"
    )


class Request:
    """One request on its way: the parts of its scope that the application needs, and its connection's bounds."""

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.method, self.path = str(scope["method"]), str(scope["path"])
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"").decode("latin-1")
        self.id = given if REQUEST_ID.fullmatch(given) else "req-" + uuid.uuid4().hex
        peer = scope.get("client") or ("", 0)
        self.front: Front | None = Front.fronts.by_name.get((peer[0], peer[1]))
        self.client = self.front.client if self.front else str(peer[0])
        # the name of its key, if keys are used
        self.bucket: int | None = None
        self.has_body = self.headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in self.headers
        self.unread = self.has_body
        self.route = route_of(self.path)
        self.key = Key("")
        # what LOG=json and traces report
        self.told: dict[str, Any] = {}
        self.asked: Asked | None = None
        self.job: Job | None = None
        self.more: list[tuple[bytes, bytes]] = []
        self.is_last = False
        self.held = 0  # bytes of its body that count in its client's share
        self.began, self.status = time.monotonic(), 499
        if self.front is not None and not self.has_body:
            self.front.body_came(0, False)

    async def receive(self) -> Message:
        message: Message = await self._receive()
        if message["type"] == "http.request":
            more = message.get("more_body", False)
            self.unread = self.unread and more
            if self.front is not None:
                self.front.body_came(len(message.get("body", b"")), more)
        return message

    async def start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.status = status
        own = [*headers, *self.more, (b"x-request-id", self.id.encode()), (b"x-content-type-options", b"nosniff")]
        # the rest of an endless body would be read for ever
        own += [(b"connection", b"close")] if self.unread or self.is_last else []
        await self._send({"type": "http.response.start", "status": status, "headers": own})

    async def write(self, data: bytes, more: bool = False) -> None:
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except RuntimeError as error:  # uvloop raises it for a connection that the client has closed
            if "closed" not in str(error):
                raise
        if not more and self.front is not None:
            self.front.answered()

    async def answer(
        self, status: int, body: bytes, kind: bytes = b"application/json", more: Mapping[str, str] = {}
    ) -> None:
        """An answer in one piece; more: headers."""
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        headers += [(name.lower().encode(), value.encode("latin-1")) for name, value in more.items()]
        await self.start(status, headers)
        await self.write(body)

    async def refuse(self, error: ApiError) -> None:
        await self.answer(error.status, json.dumps(error.body).encode(), more=error.headers)


class Endpoint:
    """The application of one worker. Limits over all workers are in `shares`.

    name: the model's id; text: Text of the room's tokenizer; stops: its StopStrings; desk: where bodies are read.
    """

    def __init__(
        self, name: str, engine: Engine, text: Any, stops: Callable[[Sequence[str]], Any], has_template: bool,
        shares: Shares, desk: Desk, end_ids: Sequence[int] = (), keys: Keys | None = None, description: bytes = b"{}",
        options: Options = Options(), metrics: Page | None = None,
    ) -> None:  # fmt: skip
        self.name, self.engine, self.text, self.stops, self.shares, self.desk = name, engine, text, stops, shares, desk
        self.end_ids, self.keys = list(end_ids), keys or Keys()
        self.options, self.metrics = options, metrics
        # the worker makes them, because they have a thread
        self.traces: Traces | None = None
        self.limits = engine.limits
        self.capacity = capacity_of(self.limits.max_batch_size)
        longest = 8 * self.limits.max_input_len * max(text.longest_piece_bytes, 12)
        self.max_body_bytes = min(MOST_BODY_BYTES, max(LEAST_BODY_BYTES, longest))
        model = {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "trtllm-bake",
            "max_model_len": self.limits.max_seq_len,
            "has_chat_template": has_template,
        }
        # by each name that it has
        self.model = {one: json.dumps({**model, "id": one}).encode() for one in (name, *options.aliases)}
        self.models = b'{"object": "list", "data": [' + b", ".join(self.model.values()) + b"]}"
        # running requests, so that they can be told when they are cut off
        self.jobs: dict[str, Job] = {}
        self.cut_off = False
        self.description = description
        page = PAGE.read_text("utf-8").replace(f"@{MARKDOWN.name}@", MARKDOWN.read_text("utf-8"))
        self.page = page.encode()
        self.page_policy = content_security_policy(page)
        self.probe: asyncio.Task[bool] | None = None
        self.watching: asyncio.Task[None] | None = None
        self.refreshing: asyncio.Task[None] | None = None

    # --- ASGI ---

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        request = Request(scope, receive, send)
        client_of_request.set(request.client)
        self._greet(request)
        try:
            await self._route(request)
        except ApiError as error:
            if error.status == 413:
                await self._discard(request)
            await request.refuse(error)
        except Exception:
            log.exception("%s: %s %s", request.id, request.method, request.path[:100])
            if request.status != 499:
                raise
            await request.refuse(ApiError(500, "The server had an error; its log says more", code="internal_error"))
        finally:
            passing.here.answered(request.route, request.status)
            self._log(request)
            if self.traces is not None:
                self._trace(self.traces, request)

    @staticmethod
    def _trace(traces: Traces, request: Request) -> None:
        """A trace that cannot be made does not make the request fail."""
        try:
            traces.tell(request)
        except Exception:
            log.exception("%s: no trace of it", request.id)

    def _greet(self, request: Request) -> None:
        """Headers that every answer has."""
        origin = request.headers.get(b"origin", b"").decode("latin-1")
        if self.options.origins and request.path.startswith("/v1"):
            request.more.append((b"vary", b"origin"))
            if origin in self.options.origins or (origin and "any" in self.options.origins):
                request.more.append((b"access-control-allow-origin", origin.encode("latin-1")))
                request.more.append((b"access-control-expose-headers", b"x-request-id, retry-after"))
        # the next request of this connection goes to another server
        request.is_last = self.shares.ending

    @staticmethod
    def _log(request: Request) -> None:
        """The line of LOG=json. It holds nothing of the prompt or the answer,
        and of the client's words only its id for the request."""
        if requests.disabled or (request.route in UNLOGGED and request.status == 200):
            return
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "request_id": request.id,
            "key": request.key.name,
            "method": request.method[:16],
            "route": request.route,
            "status": request.status,
            **request.told,
            "seconds": round(time.monotonic() - request.began, 4),
        }
        requests.info(json.dumps(line))

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.desk.open()
                self.watching = asyncio.ensure_future(Front.fronts.watch())
                self.refreshing = asyncio.ensure_future(self._refresh())
            else:
                for task in (self.watching, self.refreshing):
                    if task is not None:
                        task.cancel()
                self.desk.close()
                await self.engine.close()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return

    async def _refresh(self) -> None:
        """Read the keys again when their file has changed. A disk that hangs costs a thread."""
        while True:
            said = await asyncio.to_thread(self.keys.refresh)
            if said and not self.shares.worker:
                log.warning("%s", said)
            await asyncio.sleep(REFRESH_SECONDS)

    def cut(self) -> None:
        """Tell running requests that they end here."""
        self.cut_off = True
        for job in self.jobs.values():
            job.changed.set()

    async def _route(self, request: Request) -> None:
        path = request.path
        if request.method == "OPTIONS" and self.options.origins and path.startswith("/v1"):
            await self._preflight(request)
            return
        if path.startswith("/v1") and self.keys.asked_for:
            request.bucket = self._known(request)
        length = request.headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.max_body_bytes:
            raise ApiError(413, f"the body is larger than {self.max_body_bytes} bytes")
        if path in ("/v1/completions", "/v1/chat/completions"):
            self._only(request, "POST")
            await self._question(request, chat=path == "/v1/chat/completions")
        elif path == "/v1/models":
            self._only(request, "GET", "HEAD")
            await request.answer(200, self.models)
        elif path.startswith("/v1/models/"):
            self._only(request, "GET", "HEAD")
            if (name := path[len("/v1/models/") :]) not in self.model:
                raise ApiError(
                    404,
                    f"The model `{name[:64]}` does not exist; this server has `{self.name}`",
                    "model",
                    "model_not_found",
                )
            await request.answer(200, self.model[name])
        elif path == "/health":
            self._only(request, "GET", "HEAD")
            await self._health()
            told = {"status": "ok", "requests": self.shares.all(PLACES), "slots": self.limits.max_batch_size}
            await request.answer(200, json.dumps(told).encode())
        elif path == "/health/live":
            self._only(request, "GET", "HEAD")
            await request.answer(200, b'{"status":"ok"}')
        elif path == "/metrics" and self.metrics is not None:
            self._only(request, "GET", "HEAD")
            await request.answer(200, await self.metrics.page(), b"text/plain; version=0.0.4; charset=utf-8")
        elif path == "/openapi.json":
            self._only(request, "GET", "HEAD")
            await request.answer(200, self.description)
        elif path == "/":
            self._only(request, "GET", "HEAD")
            await request.answer(
                200,
                self.page,
                b"text/html; charset=utf-8",
                {"Content-Security-Policy": self.page_policy, "Cache-Control": "no-cache"},
            )
        else:
            raise ApiError(404, f"Unknown request URL: {request.method} {path[:100]}", None, "unknown_url")

    @staticmethod
    def _only(request: Request, *methods: str) -> None:
        if request.method not in methods:
            raise ApiError(
                405,
                f"Not allowed to {request.method} on {request.path[:100]} (allowed: {', '.join(methods)})",
                Allow=", ".join(methods),
            )

    async def _preflight(self, request: Request) -> None:
        """The answer to a browser that asks whether a page of another origin may send requests."""
        if not any(name == b"access-control-allow-origin" for name, _ in request.more):
            raise ApiError(403, "pages of this origin may not ask here (CORS_ORIGINS)")
        asked = request.headers.get(b"access-control-request-headers", b"").decode("latin-1")
        more = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "600"}
        if ASKED_HEADERS.fullmatch(asked):
            more["Access-Control-Allow-Headers"] = asked
        await request.answer(204, b"", more=more)

    def _known(self, request: Request) -> int:
        """The bucket of the key that a client shows."""
        kind, _, given = request.headers.get(b"authorization", b"").partition(b" ")
        known = self.keys.known(given.strip()) if kind.lower() == b"bearer" else None
        if known is None:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key", WWW_Authenticate="Bearer")
        request.key = known.key
        return self.shares.bucket_of_key(known.digest)

    # --- bodies ---

    async def _body(self, request: Request, bucket: int) -> bytes:
        """A whole body, counted in the client's share; the caller gives that back. Raises ApiError."""
        pieces: list[bytes] = []

        async def collect() -> None:
            more = True
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the body was cut off")
                more, piece = message.get("more_body", False), message.get("body", b"")
                if request.held + len(piece) > self.max_body_bytes:
                    raise ApiError(413, f"the body is larger than {self.max_body_bytes} bytes")
                if not self.shares.take(BODIES, bucket, len(piece), MAX_BODIES_BYTES_OF_ONE, MAX_BODIES_BYTES):
                    raise busy("too many large requests at once; try again")
                request.held += len(piece)
                pieces.append(piece)

        try:
            await asyncio.wait_for(collect(), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS} s") from None
        return b"".join(pieces)

    async def _discard(self, request: Request) -> None:
        """Most clients read no answer before they have sent everything,
        so the rest of a body that is a bit too large is read."""

        async def run_out() -> None:
            left = 4 * MOST_BODY_BYTES
            while request.unread and left > 0:
                message = await request.receive()
                left = left - len(message.get("body", b"")) if message["type"] == "http.request" else 0

        try:
            await asyncio.wait_for(run_out(), BODY_SECONDS)
        except asyncio.TimeoutError:
            pass

    # --- questions ---

    async def _question(self, request: Request, chat: bool) -> None:
        bucket = self.shares.bucket(request.client) if request.bucket is None else request.bucket
        key = request.key
        if key.requests and not self.shares.take(REQUESTS, bucket, 1, key.requests, NO_LIMIT):
            raise busy(f"this key may have {key.requests} requests at once; try again")
        try:
            await self._read_and_answer(request, bucket, chat)
        finally:
            if key.requests:
                self.shares.give(REQUESTS, bucket, 1)

    async def _read_and_answer(self, request: Request, bucket: int, chat: bool) -> None:
        try:
            data = await self._body(request, bucket)
            if request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
                # a page of another site can send anything else without being asked for permission
                raise ApiError(400, "the Content-Type must be application/json")
            asked = await self.desk.read(bucket, chat, data)
        finally:
            self.shares.give(BODIES, bucket, request.held)
        if request.key.tokens:
            spent, seconds = self.shares.spend(bucket, 0)
            if spent >= request.key.tokens:
                raise ApiError(
                    429,
                    f"this key may use {request.key.tokens} tokens a minute; try again in {seconds} s",
                    code="rate_limit_exceeded",
                    Retry_After=str(seconds),
                )
            self.shares.spend(bucket, asked.prompt_tokens)
        if not self.shares.take(PLACES, bucket, asked.count, self.capacity, CLIENTS * self.capacity):
            raise busy(f"{self.shares.has(PLACES, bucket)} answers of yours are in progress or waiting; try again")
        try:
            await self._answer(request, asked, bucket)
        finally:
            self.shares.give(PLACES, bucket, asked.count)

    async def _answer(self, request: Request, asked: Asked, bucket: int) -> None:
        """Run a request to its end, or until its client has left; then all its work stops."""
        job = Job(self.name, asked.chat, [], asked.prompt_tokens, asked.logprobs, asked.include_usage)
        job.n, job.keep = asked.n, asked.keep
        watching = None
        self.jobs[job.id] = job
        request.asked, request.job = asked, job
        request.told = {"model": self.name, "prompt_tokens": asked.prompt_tokens}
        try:
            if self.cut_off:
                raise ending()
            passing.here.asked(asked.prompt_tokens)
            self._start(job, asked, bucket, request)
            watching = asyncio.ensure_future(self._left(request, job))
            await (self._streamed(request, job) if asked.stream else self._whole(request, job))
        finally:
            if watching is not None:
                watching.cancel()
            self.jobs.pop(job.id, None)
            job.cancel()
            self._ended(request, job, bucket)

    def _ended(self, request: Request, job: Job, bucket: int) -> None:
        """Count the tokens of an answer, and note them for the log."""
        made = sum(choice.n_tokens for choice in job.choices)
        if request.key.tokens:
            self.shares.spend(bucket, made)
        reasons = [choice.finish_reason for choice in job.choices if choice.finish_reason is not None]
        if job.choices and len(reasons) == len(job.choices) and not job.left:
            passing.here.whole(time.monotonic() - request.began)
            for reason in reasons:
                passing.here.finished(reason)
        why = "left" if job.left else ",".join(sorted(set(reasons))) if len(reasons) == len(job.choices) else "error"
        request.told.update(completion_tokens=made, finish_reason=why)
        for name, times in (
            ("queue_seconds", [choice.stream.placed for choice in job.choices]),
            ("first_token_seconds", [choice.stream.first_token for choice in job.choices]),
        ):
            if came := [at for at in times if at]:
                request.told[name] = round(min(came) - request.began, 4)

    def _start(self, job: Job, asked: Asked, bucket: int, request: Request) -> None:
        """Hand every prompt to the engine, n times."""
        stops = self.stops(asked.stops)
        for number in range(asked.count):
            message = asked.shared + asked.own[number // asked.n]
            if asked.seed is not None:
                message += self.engine.message_of({"random_seed": [(asked.seed + number) % (1 << 64)]})
            told = asked.told[number // asked.n] if asked.told else []
            stream = self.engine.ask(
                message, job.changed.set, bucket, request.began, request.id, asked.likeliest, max(0, len(told) - 1)
            )
            own = copy.copy(stops)  # the tables of a stop string are made once
            own.begun = list(stops.begun)
            ends = () if asked.ignore_eos else self.end_ids
            choice = Choice(number, stream, self.text, own, asked.max_tokens, ends)
            choice.calls = None if asked.calls is None else Calls(**asked.calls)
            choice.prefix = asked.shown[number // asked.n] if asked.shown else ""
            choice.echoed, choice.begins = told, len(choice.prefix) if told else 0
            choice.starts_with_space = asked.starts_with_space
            job.choices.append(choice)

    @staticmethod
    async def _left(request: Request, job: Job) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.left = True
        job.changed.set()

    async def _news(self, job: Job) -> bool:
        """Wait for new tokens; False if the client has left. Raises ApiError if the engine fails or the server ends."""
        await job.changed.wait()
        job.changed.clear()
        if (failure := job.failure) is not None:
            raise failed(failure)
        if self.cut_off and not all(choice.stream.ended for choice in job.choices):
            raise ending()
        return not job.left

    async def _whole(self, request: Request, job: Job) -> None:
        """The answer in one piece."""
        parts: list[list[Part]] = [[] for _ in job.choices]
        while not job.done:
            if not await self._news(job):
                return
            for own, choice in zip(parts, job.choices):
                if choice.stream.ids or choice.stream.ended:
                    own.append(choice.take())

        def written() -> bytes:
            return json.dumps(job.whole(parts), ensure_ascii=False).encode()

        # the tokens of long prompts make a large answer (MAX_ECHO_TOKENS)
        await request.answer(200, await asyncio.to_thread(written) if job.logprobs else written())

    async def _streamed(self, request: Request, job: Job) -> None:
        """The answer as server-sent events, while it comes; everything that is ready goes out in one write."""
        # The status must be right, so it waits for the first token, or for the reason why there is none.
        events = job.opening()
        if not job.done and not await self._news(job):
            return
        kind, fresh = (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")
        await request.start(200, [kind, fresh, (b"x-accel-buffering", b"no")])
        while True:
            events += job.events()
            done = job.done
            if done:
                events += job.closing()
            if events:
                await request.write(events, more=not done)
                events = b""
            if done:
                return
            try:
                if not await self._news(job):
                    return
            except ApiError as error:
                await request.write(b"data: " + json.dumps(error.body).encode() + b"\n\n")
                return

    # --- health ---

    async def _health(self) -> None:
        """Healthy means that a token came out of all ranks a moment ago, or comes now. However many clients ask, the
        engine gets one question."""
        if self.shares.ending:
            raise ApiError(503, "the server is ending; it still answers, but send what is new elsewhere", code="ending")
        if time.monotonic() - self.engine.last_token > HEALTH_SECONDS:
            if self.probe is None or self.probe.done():
                self.probe = asyncio.ensure_future(self._answers())
            if not await asyncio.shield(self.probe):
                raise ApiError(503, f"no token came out of the engine within {HEALTH_SECONDS:.0f} s", code="unhealthy")

    async def _answers(self) -> bool:
        """Whether a token comes out of the engine in time."""
        changed = asyncio.Event()
        question = Question([self.text.bos_id or 0], 1, temperature=0)
        values = inputs_of(question, self.engine.end_ids, self.engine.streams, self.limits.vocab_size)
        stream = self.engine.ask(self.engine.message_of(values, TOKENS), changed.set)
        try:
            await asyncio.wait_for(changed.wait(), HEALTH_SECONDS)
            return stream.failure is None
        except asyncio.TimeoutError:
            return False
        finally:
            stream.cancel()


def content_security_policy(page: str) -> str:
    """The page's policy: only its own script and style, by their hashes; it may ask only this server."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return (
            " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)
            or "'none'"
        )

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for "
        "'script'; trusted-types 'none'"
    )
