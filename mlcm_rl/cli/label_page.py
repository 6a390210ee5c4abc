"""The page on which a person chooses between two pictures, served to this machine alone while the command runs.

It needs the extra `label` (Starlette and uvicorn), so only the command that shows it imports it.
"""

import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from .. import report
from ..preference.labels import NEITHER, SIDES, Choices
from ..training.progress import console, tell

LOOPBACK = "127.0.0.1"
HOSTS = [LOOPBACK, "localhost"]  # any other name in a request is a foreign page's, rebound to this machine
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "img-src 'self'; connect-src 'self'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
)


def serve(choices: Choices, port: int = 0) -> None:
    """Serve the page until all pairs are judged and the person is done; port 0 takes a free one.

    Ctrl-C ends it too, with KeyboardInterrupt. Raises OSError where the port cannot be used.
    """

    def stop() -> None:
        running.should_exit = True

    with listen(port) as listening:
        running = server(choices, stop)
        address = f"http://{LOOPBACK}:{listening.getsockname()[1]}"
        tell("Choose between two pictures of each prompt at", address)
        console.print("Keys 1 and 2, 0 for neither. Every choice is kept; Ctrl-C here stops.", soft_wrap=True)
        running.run(sockets=[listening])


def listen(port: int) -> socket.socket:
    """Return a socket that only this machine can reach. Raises OSError where the port cannot be used."""
    try:
        return socket.create_server((LOOPBACK, port))
    except OSError as error:
        why = f"port {port} of this machine cannot be used: {error.strerror}"
        raise OSError(f"{why}; take another --port, or none for a free one") from error


def server(choices: Choices, stop: Callable[[], None]) -> uvicorn.Server:
    """Return the page's server, which logs only warnings and ends within a second."""
    settings: dict[str, Any] = {
        "log_level": "warning",
        "lifespan": "off",
        "ws": "none",
        "server_header": False,
        "proxy_headers": False,
    }
    return uvicorn.Server(uvicorn.Config(application(choices, stop), timeout_graceful_shutdown=1, **settings))


def application(choices: Choices, stop: Callable[[], None]) -> Starlette:
    """Return the page's application. `stop` is called when all pairs are judged and the person is done.

    GET / is the page, /pair the pair to show now, /pictures/<number>/<side> a picture; POST /choices/<number>/<side>,
    /undo/<number> and /finish answer with the next pair to show, with status 409 where a page is outdated.
    """
    page = Page(choices, stop)
    routes = [
        Route("/", page.html),
        Route("/pair", page.pair),
        Route("/pictures/{number:int}/{side}", page.picture),
        Route("/choices/{number:int}/{side}", page.choose, methods=["POST"]),
        Route("/undo/{number:int}", page.undo, methods=["POST"]),
        Route("/finish", page.finish, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, HOSTS, www_redirect=False)])


class Page:
    """Answers to the page's requests, which name a pair by its number and a side by its name, never a file."""

    def __init__(self, choices: Choices, stop: Callable[[], None]):
        self.choices, self.stop = choices, stop
        folders = [Path(__file__).parent, Path(report.__file__).parent]  # the other has the fonts that both pages use
        self.template = Environment(
            loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined
        ).get_template("label.html")

    async def html(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = {"Content-Security-Policy": POLICY.format(nonce=nonce)}
        return HTMLResponse(self.template.render(nonce=nonce, out=str(self.choices.out)), headers=HEADERS | policy)

    async def pair(self, request: Request) -> Response:
        return JSONResponse(self._state(), headers=HEADERS)

    async def picture(self, request: Request) -> Response:
        number, side = request.path_params["number"], request.path_params["side"]
        if number >= len(self.choices) or side not in SIDES:
            raise HTTPException(404)
        return FileResponse(self.choices.picture(number, side), media_type="image/png", headers=HEADERS)

    async def choose(self, request: Request) -> Response:
        number, side = request.path_params["number"], request.path_params["side"]
        if side not in (*SIDES, NEITHER):
            raise HTTPException(404)
        return self._change(request, lambda: self.choices.choose(number, side))

    async def undo(self, request: Request) -> Response:
        return self._change(request, lambda: self.choices.undo(request.path_params["number"]))

    async def finish(self, request: Request) -> Response:
        return self._change(request, self._finish)

    def _finish(self) -> None:
        if len(self.choices.judgements()) < len(self.choices):
            raise ValueError("there are pairs to judge yet")
        self.stop()

    def _change(self, request: Request, change: Callable[[], None]) -> Response:
        """Make a change that our own page requests; answer with status 409 where the page is behind the disk.

        Browsers name the origin of a POST, so that no other page that a person has open can choose for them.
        """
        if request.headers.get("origin") != f"http://{request.headers['host']}":
            raise HTTPException(403, "choices are made on the page itself")
        try:
            change()
        except ValueError:
            return JSONResponse(self._state(), 409, HEADERS)
        return JSONResponse(self._state(), headers=HEADERS)

    def _state(self) -> dict:
        """Return the state of the page: the pair to be judged, if any, and the counts."""
        number, total = len(self.choices.judgements()), len(self.choices)
        state: dict[str, Any] = {"number": number, "total": total, "kept": len(self.choices.rows())}
        if number < total:
            prompt = self.choices.prompts[number]
            state |= {"prompt": prompt.prompt, "language": prompt.language}
        return state
