"""Streams that broke off: what is logged of them, and how they are resumed."""
