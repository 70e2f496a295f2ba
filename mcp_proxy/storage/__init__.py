"""Session records, event logs and mailboxes: the contracts and their in-memory implementations."""
