"""Everything that knows Redis: the client, and the stores that keep their contracts with it."""
