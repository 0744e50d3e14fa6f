"""uvicorn, with a bound on idle connections and texts that end by themselves when it stops."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bitskip_serve.app import Service

PATIENCE = 30.0  # seconds for the head of a request to come in
CONNECTIONS = 1000
HEAD = 32 << 10  # bytes


class Protocol(H11Protocol):
    """Lets go of a client that does not bring its request's head."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client is there: its patience runs."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            if self._timer is not None:  # a request is under way: its handler sees to its body
                self._timer.cancel()
                self._timer = None
        elif self._timer is None:
            self._timer = self.loop.call_later(PATIENCE, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, service: Service, grace: float, announce: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service, self._grace, self._announce = service, grace, announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.scheduler.stop()
        timer = asyncio.get_running_loop().call_later(self._grace, self._service.break_off)
        await super().shutdown(sockets)
        timer.cancel()


def server(service: Service, grace: float, announce: Callable[[], None]) -> uvicorn.Server:
    """What serves until a signal comes, and raises that again when all has ended.

    grace: seconds that texts have then. announce: called once clients may come.
    """
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # that a client has gone is no news
    config = uvicorn.Config(
        service.app(), http=Protocol, ws="none", lifespan="on", log_level="error", access_log=False,
        server_header=False, h11_max_incomplete_event_size=HEAD, limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(grace) + 10, timeout_keep_alive=30,
    )  # fmt: skip
    return _Server(config, service, grace, announce)
