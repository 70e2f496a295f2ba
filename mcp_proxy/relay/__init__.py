"""Replica to replica: how a session's requests reach the child that another replica holds."""
