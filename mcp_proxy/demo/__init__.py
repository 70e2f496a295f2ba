"""The bundled demo server: what is served when nothing is configured."""
