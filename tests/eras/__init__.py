"""Tests of the bridges between the eras."""
