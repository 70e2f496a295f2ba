"""Tests of the wire formats: pure functions on bytes."""
