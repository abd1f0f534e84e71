"""The pretrained models that are part of the package."""

import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

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
    """The model card of the embedded model whose weights are in a folder, if the model has a card of its own.

    The folder can be the embedded one or one to which the loaded model was saved, in any floating-point type and
    number of shards. Cards of the other models are rendered from their options.
    """
    for model in embedded_models().values():
        card = model.folder / "README.md"
        if card.is_file() and any(_same_weights(own, folder) for own in (model.diffusion, model.discovery)):
            return card
    return None


def _same_weights(embedded: Path, folder: Path) -> bool:
    """Whether a folder holds the weights of an embedded one, up to the rounding of either type."""
    with ExitStack() as stack:
        try:
            kept, found = (_open_weights(base, stack) for base in (embedded, folder))
        except SafetensorError:  # a damaged file has other weights
            return False
        if kept.keys() != found.keys():
            return False
        if any(kept[n].get_slice(n).get_shape() != found[n].get_slice(n).get_shape() for n in kept):
            return False
        pairs = ((kept[n].get_tensor(n), found[n].get_tensor(n)) for n in kept)
        return all(a.equal(b.to(a.dtype)) or a.to(b.dtype).equal(b) for a, b in pairs)


def _open_weights(folder: Path, stack: ExitStack) -> dict:
    """The open safetensors file of every weight in a folder, by name."""
    files = [stack.enter_context(safe_open(p, framework="pt")) for p in sorted(folder.rglob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


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
