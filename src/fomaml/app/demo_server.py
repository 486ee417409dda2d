"""The server of `fomaml demo`: a page and three questions, for this machine alone."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
from base64 import b64encode
from collections.abc import Callable, Mapping
from html import escape
from importlib import resources
from typing import Any

from fomaml.app.demo import BODY, Demo
from fomaml.app.serve_commands import steps_of
from fomaml.app.serve_options import DemoOptions
from fomaml.app.serving import open_run
from fomaml.errors import InputError, whole

ADDRESS = "127.0.0.1"
HOSTS = (ADDRESS, "localhost")
REQUESTS = 16  # at a time
GRACE = 3  # seconds for what runs when the server ends


def run_demo(options: DemoOptions) -> None:
    """Serve the page until Ctrl-C."""
    check_server()
    whole("--port", options.port, 0, 65536, " from 0 to 65535")
    with listening(options.port) as listener:
        run = open_run(
            options.run, options.weights, model=options.model, loss=options.loss, device=options.device,
            accept_changed_code=options.accept_changed_code,
        )  # fmt: skip
        demo = Demo(run, steps_of(options.steps), options.save and options.save.expanduser())
        served = server(demo)
        print(f"{address(listener)} shows {options.run} (Ctrl-C ends it)", flush=True)
        # uvicorn ends in good order; whether asyncio then raises what ended it is a race
        with contextlib.suppress(KeyboardInterrupt):
            served.run(sockets=[listener])
        print("the demo has ended")


def check_server() -> None:
    """Raise `InputError` where the libraries that serve the page are not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f'no {error.name}, which serves the page; pip install "fomaml[demo]"') from None


def listening(port: int) -> socket.socket:
    """A socket that listens on this machine alone. port: 0 takes a free one.

    Raises:
        InputError: a port in use, or one that is not allowed.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((ADDRESS, port))
        found.listen()
    except OSError as error:
        found.close()
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error.strerror})"
        raise InputError(
            f"port {port} {why}: give another --port, or --port 0, which takes a free one"
        ) from None
    return found


def address(listener: socket.socket) -> str:
    return f"http://{ADDRESS}:{listener.getsockname()[1]}"


def server(demo: Demo) -> Any:
    """The server, to be run on a socket: `server(demo).run(sockets=[listener])`."""
    import uvicorn

    page, policy = page_of(demo.facts())
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store",
    }
    config = uvicorn.Config(
        _application(demo, page), headers=list(headers.items()), server_header=False, log_config=None,
        log_level="error", access_log=False, ws="none", lifespan="off", proxy_headers=False, http="h11",
        limit_concurrency=REQUESTS, timeout_graceful_shutdown=GRACE,
    )  # fmt: skip
    return uvicorn.Server(config)


def _application(demo: Demo, page: str) -> Any:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route

    async def shown(request: Request) -> Response:
        return HTMLResponse(page)

    routes = [Route("/", shown, methods=["GET"])]
    for name, answer in (("adapt", demo.adapt), ("predict", demo.predict), ("keep", demo.keep)):
        routes.append(Route(f"/{name}", _answered(answer), methods=["POST"]))
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts, Middleware(_SameOrigin)])


def _answered(answer: Callable[[Any], dict[str, Any]]) -> Callable[[Any], Any]:
    """A question in JSON, answered in JSON; what does not go is a line, {"error": line}."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse, Response

    async def respond(request: Any) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > BODY:
                # what is left is not read: the connection has to end
                return JSONResponse({"error": _too_much()}, 413, {"Connection": "close"})
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            return JSONResponse({"error": "the request is no JSON"}, 400)
        try:
            return JSONResponse(await run_in_threadpool(answer, asked))
        except InputError as error:
            return JSONResponse({"error": str(error)}, 400)

    return respond


class _SameOrigin:
    """Passes on only what the page itself asks, or a person who types its address."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.datastructures import Headers
        from starlette.responses import JSONResponse

        found = refusal(scope["method"], Headers(scope=scope))
        if found is None:
            await self.app(scope, receive, send)
        else:
            status, why = found
            await JSONResponse({"error": why}, status, {"Connection": "close"})(scope, receive, send)


def refusal(method: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
    """Why a request is refused before it is read: status and line. headers: by names in lower case, of a known host.

    A browser says with each request which site it is of, in Sec-Fetch-Site or Origin. A form of another site can post
    without being asked, but not JSON.
    """
    site, origin = headers.get("sec-fetch-site", "none"), headers.get("origin")
    # a link on another port of this machine, as of a notebook, may lead to the page
    allowed = {"none", "same-origin"} | ({"same-site"} if method == "GET" else set())
    if site not in allowed or origin not in (None, f"http://{headers.get('host')}"):
        return 403, "a request of another site is refused"
    if method != "POST":
        return None
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return 415, "a request is JSON, with Content-Type: application/json"
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > BODY:
        return 413, _too_much()
    return None


def _too_much() -> str:
    return f"a request of more than {BODY // 2**20} MiB: give fewer or smaller pictures"


def page_of(facts: dict[str, Any]) -> tuple[str, str]:
    """The page with its style, script and facts in it; and a policy by which it loads and runs nothing else."""
    folder = resources.files("fomaml.app") / "demo_page"
    style, page, *scripts = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("style.css", "page.html", "chart.js", "pad.js", "page.js")
    )
    script = "".join(scripts)
    held = {
        "TITLE": escape(facts["run"]),
        "FACTS": json.dumps(facts).replace("<", "\\u003c"),
        "STYLE": style,
        "SCRIPT": script,
    }
    page = re.sub(r"\$([A-Z]+)\$", lambda found: held[found[1]], page)
    digests = {
        kind: b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in (("style", style), ("script", script))
    }
    own = "; ".join(f"{kind}-src 'sha256-{digest}'" for kind, digest in digests.items())
    return page, (
        f"default-src 'none'; {own}; img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
