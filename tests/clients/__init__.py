"""Tests with real clients: the official SDKs against the real command."""
