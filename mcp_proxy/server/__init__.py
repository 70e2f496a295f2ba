"""The command line, and gunicorn as this project runs it."""
