"""Everything that knows Redis: the client, and the contracts of `storage` implemented with it."""
