"""Tests of the settings, the command line and what is derived from them."""
