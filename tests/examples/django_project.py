"""A Django project with the proxy below /tools, behind middleware that meddles with requests.

The environment variable MCP_PROXY_OF_DJANGO has the settings of the proxy, as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.db import connection
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import include, path

settings.configure(
    ALLOWED_HOSTS=["127.0.0.1", "localhost", "www.example.com"],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": ":memory:",
            "ATOMIC_REQUESTS": True,
        }
    },
    MCP_PROXY=json.loads(os.environ["MCP_PROXY_OF_DJANGO"]),
    MIDDLEWARE=[
        "django.middleware.security.SecurityMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
        f"{__name__}.read_body",
        f"{__name__}.count_statements",
    ],
    ROOT_URLCONF=__name__,
    SECRET_KEY="of a test",
)


def read_body(get_response: Callable[[HttpRequest], HttpResponse]) -> object:
    """Middleware that reads what the view is to read."""

    def read(request: HttpRequest) -> HttpResponse:
        if request.headers.get("X-Read"):
            assert request.body
        return get_response(request)

    return read


def count_statements(get_response: Callable[[HttpRequest], HttpResponse]) -> object:
    """Middleware that says how much was asked of the database: a transaction is BEGIN at least."""

    def count(request: HttpRequest) -> HttpResponse:
        statements = []

        def note(execute: Callable[..., object], sql: str, *rest: object) -> object:
            statements.append(sql)
            return execute(sql, *rest)

        with connection.execute_wrapper(note):
            response = get_response(request)
        response.headers["X-Statements"] = str(len(statements))
        return response

    return count


def home(request: HttpRequest) -> JsonResponse:
    """The project's own page."""
    return JsonResponse({"of": "Django"})


urlpatterns = [path("", home), path("tools/", include("mcp_proxy.django"))]
application = get_wsgi_application()
