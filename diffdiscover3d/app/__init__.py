"""The app: segment volumes in a browser. Needs the extra `app` (Gradio), which is imported when the app starts."""

from diffdiscover3d.app.server import running_app, serve

__all__ = ["running_app", "serve"]
