"""The layer between WSGI and the transports: checks, headers, errors, logs, disconnects."""
