"""The operating system's side of a stdio server: the child, its supervisor and the guardian."""
