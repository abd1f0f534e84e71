"""Resolve a discovery network once: its folder, levels, configuration and weights.

Torch is imported when the network is loaded: a command that finds its work done needs none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from diffdiscover3d.data.domain import DOMAIN_FILE
from diffdiscover3d.data.working_grid import WorkingGrid
from diffdiscover3d.errors import ModelError
from diffdiscover3d.hub.download import fetch_snapshot
from diffdiscover3d.hub.sources import check_source, find_model
from diffdiscover3d.models.config_schema import read_config
from diffdiscover3d.models.embedded import embedded_models
from diffdiscover3d.models.window_layout import hierarchy
from diffdiscover3d.utils.files import read_model_json
from diffdiscover3d.utils.provenance import weights_sha256

if TYPE_CHECKING:
    import torch

    from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel

DEFAULT_LEVEL = 2
_KIND = "StructureDiscoveryModel"
WORKING_GRID_FILE = "working_grid.json"


@dataclass(frozen=True)
class ResolvedModel:
    """A discovery network whose files are on this machine.

    Attributes:
        name: as the user gave it: an embedded model's name, a folder, or a Hub id.
        revision: of a Hub id, as the user gave it.
        folder: that holds `config.json` and the weights.
        commit: of the Hub snapshot; `None` for other models.
        config: the contents of `config.json`, validated.
        working_grid: to which scans are resampled first; `None` if they keep their own grid.
        domain: what is known of the scans it was trained on, see `data/domain.py`; `None` if nothing is.

    The networks that [`ResolvedModel.load`] has loaded stay in memory as long as this object.
    """

    name: str
    revision: str | None
    folder: Path
    commit: str | None
    config: dict
    working_grid: WorkingGrid | None
    domain: dict | None = None
    _loaded: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels of a nested network, 1 the coarsest; empty for a single network."""
        return tuple(range(1, count + 1)) if (count := len(hierarchy(self.config))) > 1 else ()

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """The sha256 of every safetensors file, by its path in the folder."""
        return weights_sha256(self.folder)

    def choose_levels(self, level: int | str | None, num_parts: int | None = None) -> tuple[int | None, ...]:
        """The levels meant by a number, "all" or `None`, see [`choose_levels`], or the one with so many parts.

        Raises:
            ValueError: if both are given, or no level has so many parts.
        """
        if num_parts is None:
            return choose_levels(self.name, self.levels, level)
        if level is not None:
            raise ValueError("give either `level` or `num_parts`.")
        known = {one: (self.level_config(one) or {}).get("num_parts") for one in self.levels or (None,)}
        fitting = [one for one, count in known.items() if count == num_parts]
        if not fitting:
            counts = ", ".join(str(count) for count in known.values())
            raise ValueError(f"`num_parts` must be one of {counts} for {self.name}, got {num_parts}.")
        return (fitting[0],)

    def level_config(self, level: int | None = None) -> dict | None:
        """The configuration of one level; `None` if it lacks what estimates of memory need.

        Args:
            level: 1 the coarsest; default: the finest.
        """
        levels = hierarchy(self.config)
        config = levels[-1 if level is None else min(level, len(levels)) - 1]
        return config if {"num_parts", "channels", "window_size"} <= config.keys() else None

    def load(self, levels: Sequence[int | None], device: "torch.device") -> "dict[int | None, StructureDiscoveryModel]":
        """The networks of some levels. Those of one hierarchy share their weights, which are read once.

        A second call with the same levels and device returns the same networks.

        Raises:
            ModelError: if the files are damaged.
        """
        from diffdiscover3d.hub.registry import load_discovery

        key = (tuple(levels), str(device))
        if key not in self._loaded:
            if len(levels) == 1:
                networks = {levels[0]: load_discovery(str(self.folder), levels[0]).to(device)}
            else:
                nested = load_discovery(str(self.folder)).to(device).levels
                networks = {level: nested[level - 1] for level in levels}
            self._loaded[key] = networks
        return dict(self._loaded[key])

    def describe(self, level: int | None) -> dict:
        """What a sidecar records about the model, as JSON values; of a local folder its name without the path."""
        name = Path(self.name).resolve().name if Path(self.name).is_dir() else self.name
        described = {"id": name, "level": level, "revision": self.revision}
        if self.commit is not None:
            described["commit"] = self.commit
        if self.config.get("spacing"):
            described |= {"spacing": list(self.config["spacing"]), "spacing_unit": self.working_grid.unit}
        return {**described, "sha256": self.weights_sha256}


def resolve_model(name: str | ResolvedModel, revision: str | None = None) -> ResolvedModel:
    """Find a discovery network; a Hub repository is fetched, or taken from the cache.

    Args:
        name: an embedded model's name, a folder, or a Hub id; a model that is resolved already is returned as it is.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ModelError: if there is no such model, a file that describes it is damaged, or a resolved model is of another
            revision.
        NetworkError: if the Hub cannot be reached and the cache does not hold it.
    """
    if isinstance(name, ResolvedModel):
        if revision not in (None, name.revision, name.commit):
            raise ModelError(
                f"{name.name}: resolved at revision {name.revision}, not {revision}; resolve it again with that one."
            )
        return name
    commit = None
    if name in embedded_models():
        folder = embedded_models()[name].discovery
    else:
        check_source(_KIND, folder := find_model(Path(name)), name, "config.json", revision)
        if not folder.is_dir():
            folder = fetch_snapshot(name, revision=revision)
            commit = folder.name  # the cache names a snapshot's folder after its commit
    config = read_config(folder / "config.json", _KIND)
    return ResolvedModel(name, revision, folder, commit, config, _working_grid(folder, config), _read_domain(folder))


def choose_levels(name: str, known: Sequence[int], level: int | str | None) -> tuple[int | None, ...]:
    """The levels meant by a number, "all" or `None` (the default); `(None,)` for a model without levels.

    Args:
        name: of the model, for messages.
        known: its levels, empty for a single network.

    Raises:
        ModelError: if the model has no such level.
    """
    if level == "all":
        return tuple(sorted(known)) or (None,)
    if level is None:
        if not known:
            return (None,)
        level = DEFAULT_LEVEL if DEFAULT_LEVEL in known else min(known)
    if known and level not in known:
        raise ModelError(f"{name} has the levels {sorted(known)}, not {level}.")
    return (int(level),)


def _working_grid(folder: Path, config: dict) -> WorkingGrid | None:
    """The target spacing of a network, or the grid of fixed shape that earlier versions of `discover` trained on."""
    if config.get("spacing"):
        return WorkingGrid(spacing=tuple(config["spacing"]), unit=config.get("spacing_unit", "mm"))
    file = folder / WORKING_GRID_FILE
    if not file.is_file():
        return None
    try:
        grid = read_model_json(file)["grid"]
        if grid is not None and not (len(grid) == 3 and all(isinstance(n, int) and n > 1 for n in grid)):
            raise ValueError(f"`grid` must be three integers > 1, got {grid}")
    except (ModelError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: not readable ({error}); remove it to segment at full resolution.") from error
    return WorkingGrid(shape=tuple(grid)) if grid else None


def _read_domain(folder: Path) -> dict | None:
    """What [`discover`] recorded about the training scans; it only serves a note, so a damaged one counts as none."""
    file = folder / DOMAIN_FILE
    try:
        found = read_model_json(file) if file.is_file() else None
    except ModelError:
        return None
    return found if isinstance(found, dict) else None
