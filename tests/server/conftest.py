"""The environment of a test, as the tests of the settings have it, and ways into a worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.conftest import clean_environment  # noqa: F401  (a fixture)
from tests.server.ways_in import WayIn, speaking_tls, with_certificate
from tests.support.tls import Certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority, with a certificate for the server and one for clients."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(params=["plain", "tls"])
def way_in(request: pytest.FixtureRequest, tmp_path: Path) -> WayIn:
    """Each way to reach a worker."""
    if request.param == "plain":
        return WayIn(tmp_path)
    certificates: Certificates = request.getfixturevalue("certificates")
    return WayIn(tmp_path, with_certificate(certificates), speaking_tls(certificates))
