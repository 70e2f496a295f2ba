"""The reverse proxy in front of HTTP servers."""
