"""Serve a pair of models until a signal: bind, load, answer, end what is in flight, close the engines."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tessy_hf.errors import SettingsError

if TYPE_CHECKING:
    import uvicorn

    from tessy_hf.transform import TessyTransform


@contextmanager
def opened(
    transform: TessyTransform, *, name: str, host: str = "127.0.0.1", port: int = 0, max_waiting: int = 256
) -> Iterator[tuple[uvicorn.Server, socket.socket, str]]:
    """Bind the port and load the models; yield a server to be run with the socket, and its base URL.

    Args:
        transform: The pair; its journal, parts, verifier, best_of and chosen_by are not used.
        name: The model's name for clients.
        host: Address to listen on.
        port: Port to listen on; 0 for any that is free.
        max_waiting: Most requests that wait for a place in the run's window; further ones get status 429.

    Raises:
        SettingsError: uvicorn or starlette is missing, the port is taken, or the method has no one text.
        TessyError: A model, a predictor or a template cannot be used.
    """
    try:
        import uvicorn

        from tessy_hf.serve.app import Endpoint
    except ImportError as error:
        raise SettingsError(f'tessy serve needs {error.name}. Run: pip install "tessy-hf[serve]".') from error
    if transform.settings.scored:
        raise SettingsError(
            f"The method {transform.settings.method!r} chooses among candidates and cannot be served. One that writes "
            'one text is expected, such as "tessy"; pass --set method=tessy.'
        )
    served = transform.with_settings(
        journal=None,
        parts=None,
        verifier=None,
        best_of=None,
        chosen_by=None,
        id_column=None,
        prompt_column="messages",
    )
    with _bound(host, port) as listener, served:
        served.submit({"messages": []}).result()  # loads the models
        app = Endpoint(served, served.run(), name, max_waiting).app(closing=served.close)
        listener.listen()  # from here on clients may connect
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
        yield uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)), listener, url


def serve(transform: TessyTransform, ready: Callable[[str], object] = print, **options: Any) -> None:
    """Answer requests until SIGTERM or SIGINT; those in flight are answered first.

    Args:
        transform: The pair.
        ready: Called with the base URL once the models are loaded.
        **options: See :func:`opened`.

    Raises:
        TessyError: See :func:`opened`.
    """
    with opened(transform, **options) as (server, listener, url):
        ready(url)
        server.run([listener])


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, so that a port that is taken is told before models are loaded."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(f"Cannot listen on {host}:{port}: {error}. Pass another --host or --port.") from error
    return listener
