"""The process: one uvicorn server in the main thread, from the listening socket to the end of the last reply.

SIGTERM or SIGINT begins the end: new requests are refused with 503, running ones finish within `drain_seconds` and are
ended with an error after that, exit code 0. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import gc
import os
import socket
import sys
from types import FrameType
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from luciola.serve.connection import Connection
from luciola.serve.guard import Guard, ServerSettings, guarded, is_loopback

SPARE_FILES = 128  # file descriptors left to everything but connections
# The engine's thread computes in Python for milliseconds on end. By default a thread that wants the interpreter's lock
# waits 5 ms for it, each time the event loop wakes up.
SWITCH_INTERVAL = 0.0005


def listen(settings: ServerSettings) -> list[socket.socket]:
    """Sockets that listen at the settings' host and port; to be called before the model is loaded, which takes long.

    Raises ValueError if the address is open to others and no key protects it, OSError if it cannot be had.
    """
    host, port = settings.host, settings.port
    if not is_loopback(host) and not settings.api_keys and not settings.allow_unprotected:
        raise ValueError(
            f"--host {host} lets other machines in: give a key with --api-key (or in LUCIOLA_API_KEY), "
            "or --allow-unprotected if everybody who reaches it may use it"
        )
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, ip in dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found):
            address = (ip, sockets[0].getsockname()[1] if sockets else port)
            both = host == "::" and socket.has_dualstack_ipv6()
            try:
                sockets.append(socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both))
            except OSError as error:
                # `localhost` is ::1 too, also where IPv6 is switched off.
                if error.errno != errno.EADDRNOTAVAIL or len(found) == 1:
                    raise
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, "no such address")
    except (OSError, UnicodeError) as error:
        for opened in sockets:
            opened.close()
        raise OSError(_why_not(error, host, port)) from None
    return sockets


def run(app: ASGIApp, settings: ServerSettings, name: str, sockets: list[socket.socket] | None = None) -> None:
    """Serve `app`, behind the guard, until a signal; returns after draining. Call it in the main thread.

    While draining, `app.state.draining` is true, if the application has a `state`. `name` (of the model) and the
    address are printed when the first request can come. Raises what `listen` raises.
    """
    sockets = listen(settings) if sockets is None else sockets
    limit = _raise_file_limit()
    config = uvicorn.Config(
        guarded(app, settings),
        # uvicorn makes one protocol for each connection; these two arguments are the same for all.
        http=cast("type[asyncio.Protocol]", functools.partial(Connection, settings, {}, limit - SPARE_FILES)),
        ws="none",
        timeout_keep_alive=settings.keep_alive,
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    # What is there by now stays. A full collection of garbage that looks through all of it (PyTorch's modules, above
    # all) takes a fifth of a second, in which nobody is served; it is left out from now on.
    gc.collect()
    gc.freeze()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        _Server(config, settings, getattr(app, "state", None), announcement(settings, name, sockets)).run(sockets)
    finally:
        sys.setswitchinterval(interval)
        gc.unfreeze()


def announcement(settings: ServerSettings, name: str, sockets: list[socket.socket]) -> str:
    """Where the server can be reached, for people."""
    port = sockets[0].getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    lan = _lan_address() if settings.host in ("0.0.0.0", "::", "") else None
    elsewhere = f", in your network http://{lan}:{port}" if lan else ""
    url = f"http://{host}:{port}"
    return f"Serving {name} at {url} (chat page), OpenAI API at {url}/v1{elsewhere}; Ctrl-C stops"


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, settings: ServerSettings, state: Any, announcement: str) -> None:
        super().__init__(config)
        self._guard = cast(Guard, config.app)
        self._settings, self._state, self._announcement = settings, state, announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._announcement, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own would have the process die by the signal after draining, not exit with 0.
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = self._guard.draining = True
        if self._state is not None:
            self._state.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Until the running requests have ended it listens on, so that new ones and probes are told that it drains.
        await self._until_done(self._settings.drain_seconds)
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        for task in list(self.server_state.tasks):
            task.cancel()  # the guard tells the client
        await self._until_done(2.0)
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self.lifespan.shutdown()

    async def _until_done(self, seconds: float) -> None:
        """Wait for the requests that run now, each of which is one task."""
        running = set(self.server_state.tasks)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while running & self.server_state.tasks and loop.time() < deadline:
            await asyncio.sleep(0.02)


def _why_not(error: OSError | UnicodeError, host: str, port: int) -> str:
    if isinstance(error, UnicodeError | socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is no address of this machine"
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use; choose another with --port, or --port 0 for a free one"
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights; choose one above 1023 with --port"
    return f"cannot listen at {host}, port {port}: {error.strerror or error}"


def _lan_address() -> str | None:
    """The address from which this machine would speak to others; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address kept for documentation
            return str(probe.getsockname()[0])
        except OSError:
            return None


def _raise_file_limit() -> int:
    """Have this process open as many files as it is allowed to; returns how many."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return 2**20
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return soft if soft != resource.RLIM_INFINITY else 2**20
