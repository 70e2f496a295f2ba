"""What stands behind a session, and the contract by which transports use it."""
