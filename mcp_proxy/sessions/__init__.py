"""Sessions: what a session id stands for, and where the records live."""
