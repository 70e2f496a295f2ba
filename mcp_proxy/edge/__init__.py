"""What surrounds every request, between WSGI and the protocol."""
