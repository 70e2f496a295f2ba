"""The whole application below `/tools`, in a Flask and in a Django project.

`gunicorn tests.live.mounted:flask_app`, `gunicorn tests.live.mounted:django_app`; the environment
configures the proxy.
"""

import atexit

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path
from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from mcp_proxy import create_app

MOUNT = "/tools"

proxy = create_app()
atexit.register(proxy.close)

flask_app = Flask(__name__)
flask_app.add_url_rule("/", "home", lambda: "Flask")
flask_app.wsgi_app = DispatcherMiddleware(  # type: ignore[method-assign]
    flask_app.wsgi_app, {MOUNT: proxy}
)

settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="of a test")


def home(request: HttpRequest) -> HttpResponse:
    return HttpResponse("Django")


urlpatterns = [path("", home)]
django_app = DispatcherMiddleware(get_wsgi_application(), {MOUNT: proxy})
