"""The HTTP application: routes, keys, limits; texts are handed to the scheduler's thread."""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from bitskip_cpu.colours import palette
from bitskip_cpu.generation_options import GenerationOptions
from bitskip_cpu.many.scheduler import Full, Scheduler
from bitskip_cpu.many.sequence import End, Said, Sequence
from bitskip_cpu.model import Model
from bitskip_serve import reading
from bitskip_serve.answers import Answer
from bitskip_serve.metrics import metrics
from bitskip_serve.page_files import HEADERS, page_files
from bitskip_serve.reading import Asked, parse, read
from bitskip_serve.refusal import Refusal, error_body

Handler = Callable[[Request], Awaitable[Response]]
Event = tuple[int, Said | End]

OPEN = {"/health", "/v1/health", *page_files()}  # paths that need no key
PING_S = 15.0  # a stream without news says so


@dataclass(frozen=True)
class Limits:
    """What one request may take."""

    body: int = 4 << 20  # bytes
    patience: float = 30.0  # seconds for a body to come in
    seconds: float = 3600.0  # for its texts, their wait among it


class Service:
    """A model on the network. The scheduler's thread owns the engine."""

    def __init__(
        self, model: Model, scheduler: Scheduler, *, name: str, keys: tuple[str, ...] = (),
        origins: tuple[str, ...] = (), limits: Limits | None = None,
    ) -> None:  # fmt: skip
        """keys: any of them is asked for (none: nobody is asked). origins: web pages of other
        hosts that may ask, `*` for all.
        """
        self.model, self.scheduler, self.name = model, scheduler, name
        self.tokenizer = model.tokenizer  # which must be there
        self.limits = limits or Limits()
        self._keys = [key.encode() for key in keys]
        self._origins = origins
        self._started = int(time.time())
        self._reading = CapacityLimiter(1)  # one body at a time, beside the event loop
        self._writing = CapacityLimiter(1)  # one answer at a time
        self._live: set[Sequence] = set()
        self.answered: Counter[int] = Counter()
        """HTTP status -> answers."""

    def app(self) -> Starlette:
        """The application."""
        routes: list[Route] = []

        def route(path: str, handler: Handler, method: str = "GET") -> None:
            paths = {path, path.removeprefix("/v1")}
            routes.extend(Route(p, partial(self._answer, handler), methods=[method]) for p in paths)

        for path, (content, kind) in page_files().items():
            route(path, partial(_file, content, kind))
        route("/v1/health", self._health)
        route("/props", self._props)
        route("/metrics", self._metrics)
        route("/v1/models", self._models)
        route("/v1/models/{name}", self._one_model)
        route("/tokenize", self._tokenize, "POST")
        route("/detokenize", self._detokenize, "POST")
        route("/v1/completions", partial(self._texts, False), "POST")
        route("/v1/chat/completions", partial(self._texts, True), "POST")
        errors: dict[Any, Any] = {HTTPException: self._http_error}
        inner = Starlette(routes=routes, exception_handlers=errors, lifespan=self._running)
        inner.router.redirect_slashes = False
        inner.add_middleware(_Outer, service=self)
        return inner

    @asynccontextmanager
    async def _running(self, app: Starlette) -> AsyncIterator[None]:
        thread = threading.Thread(target=self.scheduler.run, name="bitskip engine", daemon=True)
        thread.start()
        yield
        self.scheduler.stop()  # `http_server` did so before; other servers of the app do not
        self.break_off()
        await run_sync(thread.join)

    def break_off(self) -> None:
        """Every text ends, with `interrupted` as the reason."""
        self.scheduler.cancel(list(self._live))

    # ---- every request ------------------------------------------------------------------

    async def _answer(self, handler: Handler, request: Request) -> Response:
        try:
            return await handler(request)
        except Refusal as refusal:
            return _json(refusal.body, refusal.status)
        except Full as full:
            return _json(error_body(503, str(full)), 503, {"Retry-After": "1"})

    async def _http_error(self, request: Request, error: HTTPException) -> Response:
        return _json(error_body(error.status_code, f"{request.url.path}: {error.detail}"),
                     error.status_code, error.headers)  # fmt: skip

    def allowed(self, scope: Scope) -> Response | None:
        """None for a request that may come in; else what it is told."""
        headers = {k.decode("latin-1"): v for k, v in scope["headers"]}
        origin = headers.get("origin", b"").decode("latin-1")
        own = origin.partition("://")[2] == headers.get("host", b"").decode("latin-1")
        if origin and not own and not self.lets_in(origin):
            text = f"pages of {origin[:100]} may not ask here: see --cors-origin"
            return _json(error_body(403, text), 403)
        if scope["method"] == "OPTIONS" and origin:
            return Response(status_code=204)
        if self._keys and scope["path"] not in OPEN:
            word, _, given = headers.get("authorization", b"").partition(b" ")
            key = given.strip() if word.lower() == b"bearer" else headers.get("x-api-key", b"")
            # All are compared, so that time tells nothing.
            if not sum([hmac.compare_digest(key, known) for known in self._keys]):
                text = "no valid API key: send it as Authorization: Bearer KEY"
                return _json(error_body(401, text), 401, {"WWW-Authenticate": "Bearer"})
        return None

    def lets_in(self, origin: str) -> bool:
        """Whether pages of another host may ask."""
        return "*" in self._origins or origin in self._origins

    async def _body(self, request: Request) -> dict[str, Any]:
        """The body as an object. Raises Refusal."""
        most, parts, size = self.limits.body, list[bytes](), 0
        large = Refusal(f"the body has more than {most} bytes", None, 413)
        length = request.headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > most):
            raise large
        try:
            async with asyncio.timeout(self.limits.patience):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise large
                    parts.append(part)
        except TimeoutError:
            raise Refusal("the body did not come in time", None, 408) from None
        except ClientDisconnect:
            raise Refusal("the client has gone") from None
        return await run_sync(parse, b"".join(parts), limiter=self._reading)

    # ---- texts --------------------------------------------------------------------------

    async def _texts(self, chat: bool, request: Request) -> Response:
        body = await self._body(request)
        asked = await run_sync(read, body, self.model, self.name, chat, limiter=self._reading)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(index: int, event: Said | End) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        texts = await run_sync(self._sequences, asked, tell, limiter=self._reading)
        answer = Answer(asked, self.tokenizer)
        self.scheduler.submit(texts)
        self._live.update(texts)
        if asked.stream:
            return _Stream(self._events(asked, answer, events), partial(self._let_go, texts))
        gone = asyncio.ensure_future(_disconnect(request))
        try:
            while not answer.over:
                got = asyncio.ensure_future(events.get())
                await asyncio.wait((got, gone), return_when=asyncio.FIRST_COMPLETED)
                if not got.done():
                    got.cancel()
                    return Response(status_code=499)  # nobody reads it
                answer.take(*got.result())
        finally:
            gone.cancel()
            self._let_go(texts)
        if answer.error is not None:
            raise Refusal(answer.error, None, 500)
        # Beside the event loop: of many texts with alternatives it takes seconds.
        return await run_sync(lambda: _json(answer.whole()), limiter=self._writing)

    def _sequences(self, asked: Asked, tell: Callable[[int, Said | End], None]) -> list[Sequence]:
        seconds = min(asked.timeout or self.limits.seconds, self.limits.seconds)
        deadline = time.monotonic() + seconds
        pairs = [(ids, options) for ids in asked.prompts for options in asked.options]
        try:
            return [
                Sequence(
                    self.model, ids, options, partial(tell, i), alternatives=asked.looked_at,
                    echo=asked.echo and asked.alternatives is not None, deadline=deadline,
                )
                for i, (ids, options) in enumerate(pairs)
            ]  # fmt: skip
        except ValueError as error:
            raise Refusal(str(error), "messages" if asked.chat else "prompt") from None

    def _let_go(self, texts: list[Sequence]) -> None:
        self.scheduler.cancel([text for text in texts if not text.over])
        self._live.difference_update(texts)

    async def _events(
        self, asked: Asked, answer: Answer, events: asyncio.Queue[Event]
    ) -> AsyncIterator[bytes]:
        """A stream's lines (server-sent events)."""
        for chunk in answer.first():
            yield _line(chunk)
        while not answer.over:
            try:
                async with asyncio.timeout(PING_S):
                    event = await events.get()
            except TimeoutError:
                yield b":\n\n"
                continue
            for chunk in answer.take(*event):
                yield _line(chunk)
        if answer.error is not None:
            yield _line(error_body(500, answer.error))
        elif asked.usage:
            yield _line(answer.usage_chunk())
        yield b"data: [DONE]\n\n"

    # ---- facts --------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        busy = self.scheduler
        if busy.failed:
            return _json(error_body(503, "the server has failed: start it anew"), 503)
        return _json({"status": "ok", "running": busy.running, "waiting": busy.waiting})

    async def _metrics(self, request: Request) -> Response:
        text = metrics(self.scheduler, self.answered)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def _props(self, request: Request) -> Response:
        model, config = self.model, self.model.config
        usual = GenerationOptions().recommended(model.folder)
        blocks = config.num_hidden_layers
        return _json({
            "model": self.name, "blocks": blocks, "exits": self.model.folder.exits,
            "trained_exits": model.folder.trained_exits, "depths": list(range(1, blocks + 1)),
            "usual_exit": usual.rule(model.folder).deepest(config),
            "context": config.max_position_embeddings, "vocab_size": config.vocab_size,
            "threads": model.threads, "kv_cache": model.kv_cache,
            "parallel": self.scheduler.parallel, "chat_template": model.folder.chat is not None,
            "rules": [{"name": w, "label": LABELS.get(w, w)} for w in reading.words(model)],
            "defaults": {n: getattr(usual, n) for n in reading.OPTIONS if n != "logit_bias"},
            "colours": palette(blocks),
        })  # fmt: skip

    def _listed(self, name: str) -> dict[str, Any]:
        config = self.model.config
        return {
            "id": name, "object": "model", "created": self._started, "owned_by": "bitskip",
            "meta": {
                "layers": config.num_hidden_layers, "context": config.max_position_embeddings,
                "vocab_size": config.vocab_size, "parameters": config.parameters(),
            },
        }  # fmt: skip

    async def _models(self, request: Request) -> Response:
        ends = [*self.model.folder.exits, *reading.words(self.model)]
        names = [self.name, *(f"{self.name}@{end}" for end in ends)]
        return _json({"object": "list", "data": [self._listed(name) for name in names]})

    async def _one_model(self, request: Request) -> Response:
        name, _ = reading.read_model(request.path_params["name"], self.model, self.name)
        return _json(self._listed(name))

    async def _tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        content = reading.text(body.get("content"), "content")
        ids = await run_sync(self.tokenizer.encode, content, limiter=self._reading)
        return _json({"tokens": ids})

    async def _detokenize(self, request: Request) -> Response:
        ids = reading.token_ids((await self._body(request)).get("tokens"), self.model, "tokens")
        return _json({"content": await run_sync(self.tokenizer.decode, ids, limiter=self._reading)})


LABELS = {
    "max": "largest probability", "margin": "lead of the best", "entropy": "entropy",
    "gate": "routing gate", "auto": "as calibrated",
}  # fmt: skip


class _Outer:
    """Around all routes: who may come in, headers, counts, and errors that are mistakes of ours."""

    def __init__(self, app: Any, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service, began = self._service, False
        origin = next((v for k, v in scope["headers"] if k == b"origin"), b"")

        async def sent(message: Any) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                service.answered[message["status"]] += 1
                if origin and service.lets_in(origin.decode("latin-1")):
                    message["headers"] += [
                        (b"access-control-allow-origin", origin), (b"vary", b"Origin"),
                        (b"access-control-allow-headers", b"authorization, content-type"),
                        (b"access-control-allow-methods", b"GET, POST"),
                    ]  # fmt: skip
            await send(message)

        refused = service.allowed(scope)
        if refused is not None:
            await refused(scope, receive, sent)
            return
        try:
            await self._app(scope, receive, sent)
        except Exception as error:
            if not began:
                text = f"a mistake of the server: {type(error).__name__}"
                await _json(error_body(500, text), 500)(scope, receive, sent)
            raise


class _Stream(StreamingResponse):
    """Server-sent events; `done` is called when they end, however that is."""

    def __init__(self, lines: AsyncIterator[bytes], done: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


async def _disconnect(request: Request) -> None:
    """Return when the client has gone; its body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _file(content: bytes, kind: str, request: Request) -> Response:
    return Response(content, headers={**HEADERS, "Content-Type": kind})


def _json(value: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(json.dumps(value).encode(), status, headers, "application/json")


def _line(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"
