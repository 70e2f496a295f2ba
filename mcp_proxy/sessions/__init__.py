"""Sessions: what a session id stands for, who may change its record, and what keeps it alive."""
