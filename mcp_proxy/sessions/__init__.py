"""Sessions: their ids and records, claims on records, and the refresh of sessions in use."""
