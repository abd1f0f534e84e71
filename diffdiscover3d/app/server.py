"""Start the app: on this machine only, without requests to others, its files in a temporary folder."""

import importlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffdiscover3d.errors import DiffDiscoverError, OutputError
from diffdiscover3d.utils.signals import interrupt_on_termination

DEFAULT_MAX_SIZE_MB = 512
_PORTS = 100  # Gradio tries so many from 7860 on
_WAITING = 20  # jobs in the queue, beyond which new ones are refused
_PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-src 'self' blob: data:; object-src 'none'; base-uri 'self'; form-action 'self'"
)


def serve(**options) -> None:
    """Run the app until it is interrupted by Ctrl-C or SIGTERM; see [`running_app`] for the options."""
    with interrupt_on_termination(), running_app(**options) as url:
        print(f"The app is running on {url} (Ctrl-C stops it).", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("The app is stopped; uploads and results are removed.")


@contextmanager
def running_app(
    *,
    models: Sequence[str] = (),
    device: str = "auto",
    host: str | None = None,
    port: int | None = None,
    max_size_mb: int = DEFAULT_MAX_SIZE_MB,
    open_browser: bool = False,
) -> Iterator[str]:
    """Run the app within the context, and remove all its files after it.

    Jobs are done one at a time; others wait in a queue. The pages of the app request nothing from other machines.

    Args:
        models: embedded models, folders or Hub ids to choose from; default: the embedded models.
        device: of [`segment`].
        host: address to listen on; default: the variable `GRADIO_SERVER_NAME`, which Spaces set, or 127.0.0.1, which
            other machines cannot reach.
        port: default: the variable `GRADIO_SERVER_PORT`, or the first free one from 7860 on.
        max_size_mb: limit of an upload in MB (2**20 bytes).
        open_browser: open the page in the default browser.

    Yields:
        The address of the page.

    Raises:
        DiffDiscoverError: if Gradio is not installed.
        ModelError, NetworkError: if a model cannot be found.
        OutputError: if the port is taken.
        ValueError: for an unknown device or a limit below 1.
    """
    if max_size_mb < 1:
        raise ValueError(f"`max_size_mb` must be at least 1, got {max_size_mb}.")
    _import_gradio()
    from diffdiscover3d.app.interface import make_page
    from diffdiscover3d.app.sessions import Sessions
    from diffdiscover3d.hub.registry import DEFAULT_MODEL, embedded_models
    from diffdiscover3d.hub.resolve import resolve_model
    from diffdiscover3d.segmentation.driver import choose_device

    choose_device(device)
    names = models or sorted(embedded_models(), key=lambda name: name != DEFAULT_MODEL)  # the default is preselected
    offered = {name: resolve_model(name).levels for name in names}
    root = Path(tempfile.mkdtemp(prefix="diffdiscover3d-app-")).resolve()
    variables = {
        "GRADIO_TEMP_DIR": str(root),
        "GRADIO_EXAMPLES_CACHE": str(root / "examples"),
        "GRADIO_ALLOWED_PATHS": "",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    with _environment(variables):
        sessions = Sessions(root)
        page = make_page(sessions, offered, device, max_size_mb * 2**20)
        try:
            yield _launch(page, host, port, max_size_mb, open_browser)
        finally:
            sessions.close()
            page.close(verbose=False)
            shutil.rmtree(root, ignore_errors=True)


def _import_gradio():
    """Import Gradio, which must see the variables that keep it from calling home.

    Raises:
        DiffDiscoverError: if it is not installed.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise DiffDiscoverError('the app needs gradio: pip install "diffdiscover3d[app]"') from error


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables within the context."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _launch(page, host: str | None, port: int | None, max_size_mb: int, open_browser: bool) -> str:
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from diffdiscover3d.app.interface import CSS, make_theme

    middleware = [Middleware(_PagePolicy)]
    local = (host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1") in ("127.0.0.1", "localhost")
    if local:  # another site whose name resolves to 127.0.0.1 is refused
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]))
    page.queue(max_size=_WAITING, default_concurrency_limit=1)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=open_browser,
            inline=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            max_file_size=max_size_mb * 2**20,
            theme=make_theme(),
            css=CSS,
            app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None},
        )
    except OSError as error:
        taken = f"port {port} is" if port else f"the {_PORTS} ports from 7860 on are"
        raise OutputError(f"{taken} not free on {host or '127.0.0.1'}; choose another by --port.") from error
    return url


class _PagePolicy:
    """ASGI middleware: browsers load nothing from other machines for the app, nor does the app for them."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        from starlette.responses import PlainTextResponse

        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ())]
                if any(key.lower() == b"content-type" and value.startswith(b"text/html") for key, value in headers):
                    headers.append((b"content-security-policy", _PAGE_POLICY.encode()))
                headers += [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": headers}
            await send(message)

        if "=http:" in scope.get("path", "") or "=https:" in scope.get("path", ""):  # Gradio would fetch it
            await PlainTextResponse("Not allowed.", status_code=403)(scope, receive, send)
            return
        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)
