"""Backends: what stands behind a session, and how messages get to it and back."""
