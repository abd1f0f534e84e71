"""Models on the Hub, embedded models and model cards; names are imported on first use."""

import importlib

_MODULES = {
    "embedded_models": "registry",
    "load_discovery": "registry",
    "load_teacher": "registry",
    "pull": "registry",
    "push": "registry",
    "push_folder": "upload",
    "render_card": "cards",
    "resolve_model": "resolve",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
