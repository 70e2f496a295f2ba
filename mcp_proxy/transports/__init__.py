"""Transports: one wire each, each a WSGI application on its own."""
