"""Tests of the session layer, against memory and a real Redis."""
