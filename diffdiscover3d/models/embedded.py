"""The pretrained models that are part of the package."""

import re
from dataclasses import dataclass
from pathlib import Path

from diffdiscover3d.utils.files import read_json

ASSETS = Path(__file__).parent.parent / "assets"
DEFAULT_MODEL = "synthetic-regular"


@dataclass(frozen=True)
class EmbeddedModel:
    """A pretrained model of the package: a diffusion model and one nested discovery network."""

    name: str
    folder: Path

    @property
    def diffusion(self) -> Path:
        """Folder of the diffusion pipeline; a model without its own uses the default model's."""
        own = self.folder / "diffusion"
        return own if own.is_dir() else ASSETS / DEFAULT_MODEL / "diffusion"

    @property
    def discovery(self) -> Path:
        """Folder of the discovery network; it holds all levels."""
        return self.folder / "discovery"

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels of the hierarchy, 1 the coarsest."""
        return nested_levels(self.discovery / "config.json")


def embedded_models() -> dict[str, EmbeddedModel]:
    """The pretrained models of the package, by name."""
    folders = sorted(p for p in ASSETS.iterdir() if p.is_dir() and (p / "discovery").is_dir())
    return {p.name: EmbeddedModel(p.name, p) for p in folders}


def embedded_card(folder: Path) -> Path | None:
    """The model card of an embedded model's folder, if the model has one of its own.

    Cards of the others are rendered from their options.
    """
    folder = folder.resolve()
    card = folder.parent / "README.md"
    return card if folder.parent.parent == ASSETS.resolve() and card.is_file() else None


def nested_levels(file: Path) -> tuple[int, ...]:
    """The levels of a nested discovery network, from its `config.json`."""
    config, depth = read_json(file), 1
    while config := config.get("parent"):
        depth += 1
    return tuple(range(1, depth + 1))


def embedded_folder(name: object, kind: str) -> Path | None:
    """The folder of an embedded model, `None` if no embedded model has this name.

    Args:
        name: as given to `from_pretrained`.
        kind: "diffusion" (the pipeline), "unet" (inside it) or "discovery".
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        return None
    model = EmbeddedModel(name, ASSETS / name)
    if not model.discovery.is_dir():
        return None
    return {"diffusion": model.diffusion, "unet": model.diffusion / "unet", "discovery": model.discovery}[kind]
