"""A Django project with users, who log in by a page of their own, and the proxy for them.

MCP_PROXY_OF_DJANGO has the settings of the proxy, as JSON, DATABASE_OF_DJANGO the file of users.
"""

from __future__ import annotations

import json
import os

import django
from django.conf import settings
from django.core.management import call_command
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import include, path

settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": os.environ["DATABASE_OF_DJANGO"],
        }
    },
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"],
    LOGIN_URL="/form",
    MCP_PROXY=json.loads(os.environ["MCP_PROXY_OF_DJANGO"]),
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.auth.middleware.LoginRequiredMiddleware",
    ],
    ROOT_URLCONF=__name__,
    SECRET_KEY="of a test",
    SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
)
django.setup()
call_command("migrate", verbosity=0)

from django.contrib import auth  # noqa: E402  (there are models from here on)
from django.contrib.auth.decorators import login_not_required  # noqa: E402
from django.contrib.auth.models import User  # noqa: E402

from mcp_proxy import Principal  # noqa: E402


@login_not_required
def log_in(request: HttpRequest, name: str) -> HttpResponse:
    """Logs a user in, whoever asks."""
    user, _ = User.objects.get_or_create(username=name)
    auth.login(request, user)
    return HttpResponse()


def log_out(request: HttpRequest) -> HttpResponse:
    """The end of a login."""
    auth.logout(request)
    return HttpResponse()


def variables(request: HttpRequest) -> dict[str, str]:
    """What the server of a user gets."""
    return {"USER_OF_DJANGO": request.user.get_username()}


def badge(request: HttpRequest) -> Principal | None:
    """Who calls, in another way."""
    name = request.headers.get("X-Badge")
    return None if name is None else Principal(f"badge:{name}")


urlpatterns = [
    path("login/<name>", log_in),
    path("logout", log_out),
    path("", include("mcp_proxy.django")),
]
application = get_wsgi_application()
