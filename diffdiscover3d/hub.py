"""Find models: the embedded ones by name, others by folder or Hub id."""

import re
from dataclasses import dataclass
from pathlib import Path

from diffusers.utils import logging as diffusers_logging

from diffdiscover3d.errors import ModelError, NetworkError
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline

ASSETS = Path(__file__).parent / "assets"
DEFAULT_MODEL = "synthetic-regular"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class EmbeddedModel:
    """A pretrained model that comes with the package: a diffusion model and a discovery network per level."""

    name: str
    folder: Path

    @property
    def diffusion(self) -> Path:
        """Folder of the diffusion pipeline."""
        return self.folder / "diffusion"

    @property
    def levels(self) -> dict[int, Path]:
        """Folders of the discovery networks by level of the hierarchy, 1 the coarsest."""
        found = sorted(self.folder.glob("discovery-level*"))
        return {int(p.name.removeprefix("discovery-level")): p for p in found}


def embedded_models() -> dict[str, EmbeddedModel]:
    """The models that come with the package, by name."""
    folders = sorted(p for p in ASSETS.iterdir() if p.is_dir() and (p / "diffusion").is_dir())
    return {p.name: EmbeddedModel(p.name, p) for p in folders}


def load_teacher(name: str) -> DiffusionFeaturePipeline:
    """Load a diffusion model as a feature pipeline.

    Args:
        name: the name of an embedded model, a folder written by the diffusion training, or a Hub id.

    Raises:
        ModelError: if there is no such model, or it is damaged.
        NetworkError: if the Hub cannot be reached.
    """
    embedded = embedded_models()
    source = str(embedded[name].diffusion) if name in embedded else name
    return _load(DiffusionFeaturePipeline, source, marker="model_index.json")


def load_discovery(name: str, level: int | None = None, revision: str | None = None) -> StructureDiscoveryModel:
    """Load a discovery network.

    Args:
        name: the name of an embedded model, a folder written by the discovery training, or a Hub id.
        level: which of an embedded model's levels; other models have one.

    Raises:
        ModelError: if there is no such model or level, or it is damaged.
        NetworkError: if the Hub cannot be reached.
    """
    return _load(StructureDiscoveryModel, discovery_source(name, level), marker="config.json", revision=revision).eval()


def discovery_source(name: str, level: int | None = None) -> str:
    """The folder or Hub id that `load_discovery` loads from."""
    embedded = embedded_models()
    if name not in embedded:
        if level is not None:
            raise ModelError(f"{name}: only embedded models have levels ({', '.join(embedded)}); leave the level out.")
        return name
    levels = embedded[name].levels
    level = min(levels) if level is None else level
    if level not in levels:
        raise ModelError(f"{name} has the levels {sorted(levels)}, not {level}.")
    return str(levels[level])


def _load(kind, source: str, marker: str, **options):
    folder = Path(source)
    if folder.is_dir():
        if not (folder / marker).is_file():
            raise ModelError(f"{source}: no {kind.__name__} in this folder ({marker} is missing).")
    elif not _REPO_ID.fullmatch(source):
        known = ", ".join(embedded_models())
        raise ModelError(f"{source!r}: no such folder, and no Hub id (user/name); embedded models: {known}.")
    if options.get("revision") and folder.is_dir():
        raise ModelError(f"{source}: a folder has no revisions; --revision goes with a Hub id.")
    diffusers_logging.disable_progress_bar()  # two small files: a bar says nothing
    try:
        return kind.from_pretrained(source, **options)
    except ModelError:
        raise
    except Exception as error:  # diffusers, safetensors and the Hub's client raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        from_network = isinstance(error, OSError) or type(error).__module__.startswith("httpx")
        if from_network and not folder.is_dir():
            raise NetworkError(f"{source}: cannot be fetched from the Hub: {reason}") from error
        raise ModelError(f"{source}: cannot be loaded as {kind.__name__}: {reason}") from error
