"""The proxy in a Django project: a line in its urls.py, and `MCP_PROXY` in its settings.py.

    urlpatterns = [path("", include("mcp_proxy.django"))]

    MCP_PROXY = {"command": "python -m mcp_server_time", "threads": 16}

`MCP_PROXY` has settings of `ProxyConfig` by their names: texts as in the environment, or values.
Django decides about Host (ALLOWED_HOSTS), and its middleware sees the requests; of CSRF checks and
of ATOMIC_REQUESTS they are free. Importing this module reads the settings, and raises
ImproperlyConfigured where they do not fit; nothing starts before the first request.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db.transaction import non_atomic_requests
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import re_path
from django.views.decorators.csrf import csrf_exempt

from mcp_proxy.app import Application, create_app
from mcp_proxy.config import from_values, values_of
from mcp_proxy.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# What the server decides that Django runs in, and Django's LOGGING.
_NOT_OURS = (
    *("bind", "workers", "worker_class", "client_timeout", "max_header_bytes", "http_keepalive"),
    *("passing", "session_dir", "cpu_affinity", "log_format", "log_level"),
)

# Below where the patterns are included. Of the documents about an HTTP server only those for OAuth.
_PATHS = r"^(?P<path>(?:mcp|sse|messages|servers|\.well-known/oauth-[a-z-]+)(?:/.*)?)$"


def _make_application() -> Application:
    """The application that settings.py describes; raises ImproperlyConfigured."""
    given = getattr(settings, "MCP_PROXY", None)
    if not isinstance(given, Mapping):
        raise ImproperlyConfigured(
            'MCP_PROXY must be a dict in the settings, such as {"command": "python -m my_server"}'
        )
    for name in _NOT_OURS:
        if name in given:
            raise ImproperlyConfigured(
                f"MCP_PROXY: {name} has no effect in Django: set it where Django is served"
            )
    try:
        texts = values_of({name: value for name, value in given.items() if isinstance(value, str)})
        return create_app(from_values({"allowed_hosts": _hosts(), **given, **texts}))
    except ConfigError as error:
        raise ImproperlyConfigured(f"MCP_PROXY: {error}") from error


def _hosts() -> tuple[str, ...] | None:
    """Any Host, since Django has checked it; and its names, whose pages may call.

    Where Django checks nothing we do: a loopback address is served under a loopback name.
    """
    if "*" in settings.ALLOWED_HOSTS:
        return None
    return ("*", *(name.strip("[]") for name in settings.ALLOWED_HOSTS if name[:1] != "."))


#: The proxy. It is closed when the process ends.
application = _make_application()
atexit.register(application.close)


def serve(request: HttpRequest, path: str) -> HttpResponse | StreamingHttpResponse:
    """Answers an MCP request to `path`; raises DisallowedHost as any view of Django's does.

    The answer streams where the proxy's does. Raises ImproperlyConfigured under ASGI.
    """
    request.get_host()
    begun: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], _: Any = None) -> Any:
        begun[:] = [int(status[:3]), headers]

    body = application(_environ(request, path), start_response)
    return _response(body, *begun)


def _environ(request: HttpRequest, path: str) -> WSGIEnvironment:
    """The request as the application has it, which looks at what is below the mount."""
    if not hasattr(request, "environ"):
        raise ImproperlyConfigured("mcp_proxy.django is served by WSGI servers only, not by ASGI")
    environ = dict(request.environ)
    mount = request.path_info.removesuffix(f"/{path}").encode().decode("latin-1")
    environ["SCRIPT_NAME"] = environ.get("SCRIPT_NAME", "") + mount
    environ["PATH_INFO"] = environ["PATH_INFO"].removeprefix(mount)
    if "_body" in vars(request):  # middleware has read it
        environ["wsgi.input"] = BytesIO(request.body)
    return environ


def _response(
    body: Iterable[bytes], status: int, headers: list[tuple[str, str]]
) -> HttpResponse | StreamingHttpResponse:
    """The answer as Django's, whose server closes the body at its end."""
    if isinstance(body, list):
        response = HttpResponse(b"".join(body), status=status)
    else:
        response = StreamingHttpResponse(body, status=status)
    del response.headers["Content-Type"]  # Django's own choice
    for name, value in headers:
        if name.lower() == "set-cookie":
            response.cookies.load(value)
        else:
            response.headers[name] = value
    return response


urlpatterns = [re_path(_PATHS, csrf_exempt(non_atomic_requests(serve)))]
