"""The wires to clients in front of stdio servers."""
