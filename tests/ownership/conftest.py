"""Several replicas, as the tests of the transports have them."""

from tests.transports.conftest import fleeting, store, three  # noqa: F401  (fixtures)
