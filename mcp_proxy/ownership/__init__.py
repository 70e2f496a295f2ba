"""Which replica holds the backend of a session: found, started, brought back, ended."""
