"""Dagster's web page behind a guard: ``python -m pipelines.webserver PORT WORKSPACE``, started by ``alignflow ui``.

Dagster's own server answers whoever reaches it: a web page from anywhere, open in the user's browser, could launch runs
through it with one plain request. Here a request must be addressed to this machine by name and must not come from
another site. A port forwarded over ssh works, since only names are compared.
"""

import sys
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

HOST = "127.0.0.1"
NAMES = frozenset({HOST, "localhost", "::1"})


class OwnPagesOnly:
    """ASGI middleware: 403 for a foreign ``Host`` (DNS rebinding) and for what another site's page sends (request forgery).

    A link to this page may be followed; nothing else from elsewhere is answered, be it read, written or framed.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Pass on what is our own, refuse the rest."""
        if scope["type"] not in ("http", "websocket") or is_own(Headers(scope=scope)):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: the server says 403
        else:
            refusal = PlainTextResponse("refused: open this page as http://localhost or http://127.0.0.1 with its port, not from another site\n", 403)
            await refusal(scope, receive, send)


def is_own(headers: Headers) -> bool:
    """Whether the request names this machine and comes from its own page, from the address bar, from a link or from a script."""
    host = headers.get("host", "")
    if hostname(f"//{host}") not in NAMES:
        return False
    if "origin" in headers:
        return headers["origin"] == f"http://{host}"
    return headers.get("sec-fetch-site", "none") in ("none", "same-origin") or headers.get("sec-fetch-dest") == "document"


def hostname(address: str) -> str | None:
    """Name in an address, ``None`` where it makes no sense."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def serve(port: int, workspace: str) -> None:
    """Dagster's own command with the guard in front; serves on loopback until interrupted.

    Args:
        port: port on ``127.0.0.1``.
        workspace: path of a ``workspace.yaml`` that names the running code server.
    """
    from dagster_webserver.cli import dagster_webserver
    from dagster_webserver.webserver import DagsterWebserver
    from starlette.middleware import Middleware

    dagsters_own = DagsterWebserver.build_middleware
    DagsterWebserver.build_middleware = lambda self: [Middleware(OwnPagesOnly), *dagsters_own(self)]  # type: ignore[method-assign]
    dagster_webserver(["--host", HOST, "--port", str(port), "--workspace", workspace])


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
