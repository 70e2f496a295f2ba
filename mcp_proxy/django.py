"""The proxy in a Django project: a line in its urls.py, and `MCP_PROXY` in its settings.py.

    urlpatterns = [path("", include("mcp_proxy.django"))]

    MCP_PROXY = {"command": "python -m mcp_server_time", "threads": 16}

`MCP_PROXY` has settings of `ProxyConfig` by their names: texts as in the environment, or values.
Three more are functions of Django's request, or their dotted paths, and who has to be logged in:
`authenticate` returns a Principal or None, `env_for` the variables of this caller's server, and
`login_required`, which is on where AuthenticationMiddleware is, lets in the users of the project.
Django decides about Host (ALLOWED_HOSTS), and its middleware sees the requests; of CSRF checks and
of ATOMIC_REQUESTS they are free. Importing this module reads the settings, and raises
ImproperlyConfigured where they do not fit; nothing starts before the first request.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db.transaction import non_atomic_requests
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import re_path
from django.utils.module_loading import import_string
from django.views.decorators.csrf import csrf_exempt

from mcp_proxy.app import Application, create_app
from mcp_proxy.auth.principal import Principal
from mcp_proxy.config import from_values, values_of
from mcp_proxy.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

# What the server decides that Django runs in, and Django's LOGGING.
_NOT_OURS = (
    *("bind", "workers", "worker_class", "client_timeout", "max_header_bytes", "http_keepalive"),
    *("passing", "session_dir", "cpu_affinity", "log_format", "log_level"),
)

# Middleware of Django's own that says who is logged in.
_OF_LOGINS = "django.contrib.auth.middleware.AuthenticationMiddleware"

# Where the environ of the application has Django's request.
_REQUEST = "mcp_proxy.django.request"

# Below where the patterns are included. Of the documents about an HTTP server only those for OAuth.
_PATHS = r"^(?P<path>(?:mcp|sse|messages|servers|\.well-known/oauth-[a-z-]+)(?:/.*)?)$"


def _make_application() -> Application:
    """The application that settings.py describes; raises ImproperlyConfigured."""
    given = getattr(settings, "MCP_PROXY", None)
    if not isinstance(given, Mapping):
        raise ImproperlyConfigured(
            'MCP_PROXY must be a dict in the settings, such as {"command": "python -m my_server"}'
        )
    values = dict(given)
    env_for = _hook("env_for", values.pop("env_for", None))
    authenticate = _hook("authenticate", values.pop("authenticate", None))
    if values.pop("login_required", _OF_LOGINS in settings.MIDDLEWARE) and authenticate is None:
        authenticate = _hook("login_required", user_of)
    for name in _NOT_OURS:
        if name in values:
            raise ImproperlyConfigured(
                f"MCP_PROXY: {name} has no effect in Django: set it where Django is served"
            )
    try:
        texts = values_of({name: value for name, value in values.items() if isinstance(value, str)})
        config = from_values({"allowed_hosts": _hosts(), **values, **texts})
        return create_app(config, authenticate, env_for)
    except ConfigError as error:
        raise ImproperlyConfigured(f"MCP_PROXY: {error}") from error


def _hook(name: str, given: Any) -> Callable[[WSGIEnvironment], Any] | None:
    """A function of the project, for which a request is Django's; None where there is none.

    Raises ImproperlyConfigured.
    """
    if given is None:
        return None
    try:
        function = import_string(given) if isinstance(given, str) else given
    except ImportError as error:
        raise ImproperlyConfigured(f"MCP_PROXY: {name}: {error}") from error
    if not callable(function):
        raise ImproperlyConfigured(
            f"MCP_PROXY: {name} is a function of a request, or the dotted path of one"
        )
    return lambda environ: function(environ[_REQUEST])


def user_of(request: HttpRequest) -> Principal | None:
    """The user who sends a request, `user:` and the primary key; None where nobody is logged in.

    Its claim `username` is for `env_from`. Raises ImproperlyConfigured where no middleware says who
    is logged in.
    """
    user = getattr(request, "user", None)
    if user is None:
        raise ImproperlyConfigured(
            "MCP_PROXY: login_required needs AuthenticationMiddleware, or other middleware that "
            "sets request.user"
        )
    if not user.is_authenticated:
        return None
    return Principal(f"user:{user.pk}", claims={"username": user.get_username()})


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
    environ = {**request.environ, _REQUEST: request}
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


_view = csrf_exempt(non_atomic_requests(serve))
_view.login_required = False  # LoginRequiredMiddleware would redirect to a page with a form
urlpatterns = [re_path(_PATHS, _view)]
