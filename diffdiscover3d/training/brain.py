"""Train `brain-flair`: targets are assignments made without labels, inputs are harder views of the same scenes.

Each step draws scenes ([`draw_scene`]) from the scans. The conspicuous rendering of a scene is clustered
([`conspicuous_outliers`]), and the network learns to find the same parts in the realistic rendering. Scenes that keep
the scan's own lesions carry the scan's assignment: first [`bright_outliers`], later, renewed every `reassign_every`
steps, that of the averaged network and the intensities together, as in expectation maximisation. No mask of an implant
or of a scan enters a loss, and the last average of the weights is kept.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffdiscover3d.data.datasets.brain_scans import BrainScans
from diffdiscover3d.data.transforms import resize_volume
from diffdiscover3d.losses import photometric_invariance, region_consistency
from diffdiscover3d.models.brightness import add_brightness
from diffdiscover3d.models.loading import cast_weights
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.reporting.pictures import save_slices
from diffdiscover3d.training.brain_assignments import (
    bright_outliers,
    conspicuous_outliers,
    smooth_away,
)
from diffdiscover3d.training.brain_config import NETWORKS, BrainConfig
from diffdiscover3d.training.brain_scenes import Scene, acquire_again, draw_scene
from diffdiscover3d.training.config import DiffusionConfig
from diffdiscover3d.training.diffusion import DiffusionTraining

BACKGROUND, BRAIN, LESION = 0, 1, 2  # part numbers of the finest level


def make_network(config: BrainConfig) -> StructureDiscoveryModel:
    """The nested network: level 1 background | brain, level 2 with the brain divided into brain | lesion."""
    shared = {"dropout": 0.0, "norm": "instance", "scaling": "robust", "frame": config.frame}
    bright = {"bright_part": LESION}
    coarse, fine = NETWORKS[config.preset]
    return StructureDiscoveryModel.from_parent(
        StructureDiscoveryModel(2, **shared, **coarse), (1, 2), **shared, **bright, **fine
    )


class BothLevels(torch.nn.Module):
    """Both levels in one forward pass, each trained on its own targets."""

    def __init__(self, network: StructureDiscoveryModel):
        super().__init__()
        self.network = network.requires_grad_(True)

    def forward(self, view: torch.Tensor, brain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of level 1, and of brain against lesion, inside a given brain."""
        coarse = self.network.parent_model.scaled_logits(view)
        return coarse, self.network.scaled_logits(view, brain.long())[:, BRAIN : LESION + 1]


class SceneBank:
    """The scans of a training on its device, with and without their own lesions, and the scenes drawn from them."""

    def __init__(self, scans: BrainScans, real_share: float, device: torch.device):
        items = [scans[i] for i in range(len(scans))]
        self.real_share, self.device = real_share, device
        self.tissue = torch.stack([item["volume"] for item in items]).to(device)
        self.brains = torch.stack([item["foreground"] for item in items]).to(device)
        self.first = torch.cat(
            [bright_outliers(t[None], b[None]) for t, b in zip(self.tissue, self.brains, strict=True)]
        )
        self.assign(self.first)

    def assign(self, lesions: torch.Tensor) -> None:
        """Take (N, 1, H, W, D) bool assignments as the scans' own lesions; smooth away them and the first ones."""
        self.lesions = lesions
        triples = zip(self.tissue, self.brains, lesions | self.first, strict=True)
        self.healthy = torch.cat([smooth_away(t[None], b[None], x[None]) for t, b, x in triples])

    def scenes(self, index: torch.Tensor, seeds: torch.Tensor) -> Scene:
        """A scene from each scan of `index`; a function of the seeds, on one kind of device."""
        generator = torch.Generator(self.device).manual_seed(int(seeds.sum()) % 2**62)
        chosen = index.tolist()  # an index on the host would be copied to a GPU, and the host wait
        own = torch.rand(len(index), generator=generator, device=self.device) < self.real_share
        own = own.view(-1, 1, 1, 1, 1)
        tissue, healthy, lesions, brains = (
            torch.stack([scans[i] for i in chosen]) for scans in (self.tissue, self.healthy, self.lesions, self.brains)
        )
        carried = (lesions & own).float()
        return draw_scene(torch.where(own, tissue, healthy), brains.float(), carried, generator)


class BrainTraining:
    """The nested network, its scenes and its losses."""

    name = "brain"
    suits_graphs = True
    has_one_shape = True

    def __init__(self, config: BrainConfig, scans: BrainScans, accelerator: Accelerator):
        torch.manual_seed(config.seed)
        self.config, self.accelerator, self.scans = config, accelerator, scans
        self.network = make_network(config).to(accelerator.device)
        self.model = BothLevels(self.network)
        self.ema = EMAModel(self.model.parameters(), decay=config.ema_decay, foreach=True)
        self.bank = SceneBank(scans, config.real_share, accelerator.device)
        self.volume_grid = None

    def draw(self, volume: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"seed": torch.randint(2**48, (), generator=generator)}

    @torch.no_grad()
    def prepare(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scene = self.bank.scenes(batch["index"], batch["seed"])
        lesion = conspicuous_outliers(scene.conspicuous, scene.foreground) | (scene.carried > 0)
        prepared = {"view": scene.view, "foreground": scene.foreground, "lesion": lesion}
        if self.config.lambda_invariance > 0:
            generator = torch.Generator(scene.view.device).manual_seed(int(batch["seed"].sum() + 1) % 2**62)
            prepared["again"] = acquire_again(scene.view, scene.foreground, generator)
        return prepared

    def losses(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        config, view, inside, targets = self.config, batch["view"], batch["foreground"], batch["lesion"].float()
        brain = inside.float()
        coarse, fine = model(view, inside)
        margin = _margin(fine, inside)
        probability = torch.sigmoid(margin) * brain
        pointwise = F.binary_cross_entropy_with_logits(margin, targets, reduction="none")
        terms = {
            "level1": F.cross_entropy(coarse.float(), inside[:, 0].long()),
            "entropy": config.lambda_entropy * (pointwise * brain).sum() / brain.sum(),
            "dice": config.lambda_dice * (1 - _soft_dice(probability, targets)),
        }
        if config.lambda_visual > 0:
            masks = torch.cat([1 - brain, brain - probability, probability], dim=1)
            within = torch.cat([1 - brain, brain], dim=1)
            terms["visual"] = config.lambda_visual * region_consistency(masks, view, relative=True, within=within)
        if config.lambda_invariance > 0:
            second = torch.sigmoid(_margin(model(batch["again"], inside)[1], inside)) * brain
            both = [torch.cat([brain - p, p], dim=1) for p in (probability, second)]
            terms["invariance"] = config.lambda_invariance * photometric_invariance(*both)
        return {"loss": sum(terms.values()), **terms}

    def compile(self) -> None:
        self.network.network.compile()

    def has_metrics_after(self, step: int) -> bool:
        every = self.config.reassign_every
        return bool(every) and step % every == 0 and step < self.config.max_steps

    def after_step(self, step: int) -> dict[str, float]:
        self.ema.to(self.accelerator.device)
        self.ema.step(self.model.parameters())
        if not self.has_metrics_after(step):
            return {}
        before = self.bank.lesions
        with self._averaged():
            self.bank.assign(self.find_lesions())
        same = 2 * (before & self.bank.lesions).sum() / (before.sum() + self.bank.lesions.sum()).clamp(min=1)
        return {"agreement": float(same)}

    @torch.no_grad()
    def find_lesions(self) -> torch.Tensor:
        """The lesions of the scans themselves, (N, 1, H, W, D) bool: network and brightness together.

        The network's logit, the mean of a scan and its mirror image, and the evidence of the intensities
        ([`add_brightness`]) are added, as prior and likelihood: the network alone could confirm its own mistakes.
        """
        found = []
        for volume, inside in zip(self.bank.tissue, self.bank.brains, strict=True):
            scan, brain = volume[None], inside[None]
            with self.accelerator.autocast():
                plain = _margin(self.model(scan, brain)[1], brain)
                mirrored = _margin(self.model(scan.flip(2), brain.flip(2))[1], brain.flip(2)).flip(2)
            found.append((add_brightness((plain + mirrored) / 2, scan, brain) > 0) & brain)
        return torch.cat(found)

    def preview(self, step: int, folder: Path) -> None:
        with self._averaged():
            found = self.find_lesions()[:3]
        labels = [(b.int() + f.int())[0].cpu().numpy() for b, f in zip(self.bank.brains, found, strict=False)]
        save_slices(folder / f"parts-{step:08d}.png", [v[0].cpu().numpy() for v in self.bank.tissue[:3]], labels)

    def _averaged(self):
        return _AveragedWeights(self.ema, self.model)

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        state = self.ema.state_dict()
        shadow = {str(i): p for i, p in enumerate(state["shadow_params"])}
        return {
            "ema": {**shadow, "step": torch.tensor(state["optimization_step"])},
            "lesions": {"assigned": self.bank.lesions.to(torch.uint8)},
        }

    def load_state(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        ema = dict(tensors["ema"])
        step = int(ema.pop("step"))
        shadow = [ema[str(i)] for i in range(len(ema))]
        self.ema.load_state_dict({**self.ema.state_dict(), "optimization_step": step, "shadow_params": shadow})
        self.bank.assign(tensors["lesions"]["assigned"].to(self.bank.device).bool())

    def save(self, folder: Path, final: bool = True) -> None:
        """Write the averaged network; part numbers are constant: 0 background, 1 brain, 2 lesion."""
        model = copy.deepcopy(self.model)
        self.ema.copy_to(model.parameters())
        cast_weights(model.network, self.config.save_dtype)
        model.network.register_to_config(_name_or_path="")
        model.network.save_pretrained(folder)


class BrainDiffusion(DiffusionTraining):
    """The diffusion model, trained on scenes in place of the scans themselves."""

    def __init__(self, config: DiffusionConfig, bank: SceneBank):
        super().__init__(config, None)  # frames are resampled to the UNet's grid before the noise
        self.bank, self.volume_grid = bank, None

    def draw(self, volume: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        drawn = super().draw(torch.empty(1, *self.model.noise_grid), generator)
        return {**drawn, "seed": torch.randint(2**48, (), generator=generator)}

    @torch.no_grad()
    def prepare(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        view = self.bank.scenes(batch["index"], batch["seed"]).view
        return super().prepare({**batch, "volume": resize_volume(view, self.model.noise_grid)})


class _AveragedWeights:
    """The averaged weights in place of the trained ones, and back."""

    def __init__(self, ema: EMAModel, model: torch.nn.Module):
        self.ema, self.model = ema, model

    def __enter__(self):
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())

    def __exit__(self, *_):
        self.ema.restore(self.model.parameters())


def _margin(logits: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W, D) logit of lesion against brain; 0 outside of the brain, where both logits are minus infinity."""
    logits = logits.float()
    return torch.where(inside, logits[:, 1:] - logits[:, :1], torch.zeros_like(logits[:, 1:]))


def _soft_dice(probability: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Soft Dice over a whole batch, so that scenes without a lesion count as well."""
    overlap = (probability * targets).sum()
    return (2 * overlap + 1) / (probability.sum() + targets.sum() + 1)
