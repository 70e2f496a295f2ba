"""What an operator sees: metrics, health, and the page about what goes on just now."""
