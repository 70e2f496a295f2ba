"""gunicorn as somebody else has configured it: none of our settings and hooks."""

bind = "127.0.0.1:0"
worker_class = "gthread"
threads = 16
control_socket_disable = True
