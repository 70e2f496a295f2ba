"""The edge: what every transport surrounds itself with, between WSGI and the protocol."""
