"""The environment of a test, as the tests of the settings have it."""

from tests.config.conftest import clean_environment  # noqa: F401  (a fixture)
