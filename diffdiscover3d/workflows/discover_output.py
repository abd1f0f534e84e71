"""What `discover` returns if it leaves no files."""

from dataclasses import dataclass
from pathlib import Path

from diffusers.utils import BaseOutput

from diffdiscover3d.data.domain import DOMAIN_FILE
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.utils.staging import staged_folder


@dataclass
class DiscoverOutput(BaseOutput):
    """Output of [`discover`] without an output folder.

    Attributes:
        model: the nested network of all levels in evaluation mode, on the CPU; `model.levels` lists the networks,
            coarsest first. Its methods take volumes with voxels of `model.config.spacing`; save it and call [`segment`]
            to have volumes resampled.
        pipeline: the diffusion model, as a pipeline that extracts its features.
        labels: for each volume that could be read, in their order, a dict of label maps by level, 1 the coarsest, as
            [`segment`] returns them: (H, W, D) arrays for arrays and tensors, images of the same library and grid for
            images, nibabel images for files.
        domain: what is known of the scans, see `data/domain.py`.
    """

    model: StructureDiscoveryModel
    pipeline: DiffusionFeaturePipeline
    labels: list[dict]
    domain: dict

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `diffusion/` and `discovery/` to a folder, which `segment(model=...)` and the commands take.

        Raises:
            OutputError: if it cannot be written.
        """
        with staged_folder(save_directory, overwrite=True) as folder:
            self.pipeline.save_pretrained(folder / "diffusion")
            self.model.save_pretrained(folder / "discovery")
            write_json(folder / "discovery" / DOMAIN_FILE, self.domain)
