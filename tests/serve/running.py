"""A served pair in this process, and clients for it."""

import threading
from contextlib import contextmanager

from tessy_hf.serve.server import opened


@contextmanager
def running(transform, **options):
    """Serve a transform on a free port; yield the base URL."""
    with opened(transform, name="pair", **options) as (server, listener, url):
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join()
