"""Features of MedicalNet's ResNet-50 (Chen et al., Med3D, 2019): k-means on them, and the paper's losses with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.cluster import MiniBatchKMeans
from torch import nn

from diffdiscover3d.baselines.base import TrainedBaseline, place
from diffdiscover3d.baselines.fitting import Schedule
from diffdiscover3d.data.transforms import min_max_normalize
from diffdiscover3d.errors import ModelError, NetworkError, first_line
from diffdiscover3d.losses import photometric_invariance, region_consistency
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel

HUB_ID = "TencentMedicalNet/MedicalNet-Resnet50"
_HUB_FILES = ("resnet_50_23dataset.pth", "resnet_50.pth")


class Med3DFeatures(nn.Module):
    """The output of `layer1[2].conv2` of MedicalNet's ResNet-50: 64 channels at a quarter of the resolution.

    Args:
        seed: of the noise that replaces zeros.
    """

    channels = 64

    def __init__(self, seed: int = 0):
        super().__init__()
        from monai.networks.nets import resnet50

        self.seed = seed
        self.network = resnet50(
            spatial_dims=3,
            n_input_channels=1,
            feed_forward=False,
            shortcut_type="B",
            bias_downsample=False,
            conv1_t_stride=2,
        )
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Features (B, 64, ceil(H/4), ceil(W/4), ceil(D/4)) of (B, 1, H, W, D) volumes in [0, 1]."""
        n = self.network
        x = n.maxpool(n.act(n.bn1(n.conv1(self.standardize(volumes)))))
        x = n.layer1[1](n.layer1[0](x))
        last = n.layer1[2]
        return last.conv2(last.act(last.bn1(last.conv1(x))))

    def standardize(self, volumes: torch.Tensor) -> torch.Tensor:
        """Voxels above 0 to zero mean and unit variance in each volume, the others to seeded normal noise."""
        positive = volumes > 0
        count = positive.sum(dim=(2, 3, 4), keepdim=True).clamp(min=1)
        mean = (volumes * positive).sum(dim=(2, 3, 4), keepdim=True) / count
        spread = (((volumes - mean) * positive).square().sum(dim=(2, 3, 4), keepdim=True) / count).sqrt()
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(volumes.shape[1:], generator=generator).to(volumes.device).expand_as(volumes)
        return torch.where(positive, (volumes - mean) / spread.clamp(min=1e-6), noise)


def load_med3d(source: str | Path, seed: int = 0) -> Med3DFeatures:
    """Load MedicalNet's published weights; nothing in the file is executed.

    Args:
        source: a `.pth` file as published, a `.safetensors` file with the same tensors, or a Hub id.
        seed: of the noise that replaces zeros.

    Raises:
        ModelError: if the file is damaged, holds anything but tensors, or has other tensors than the ResNet-50.
        NetworkError: if the weights cannot be had from the Hub.
    """
    file = Path(source)
    if not file.is_file():
        file = _download(str(source))
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise almost anything
        raise ModelError(f"{file}: is not a file of weights ({first_line(error)}); download it again.") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ModelError(f"{file}: must map names to tensors; give MedicalNet's resnet_50.pth.")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    features = Med3DFeatures(seed)
    expected = features.network.state_dict()
    # older files lack this counter, which is not used for inference
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, value)
    missing, other = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape]
    for problem, names in (("lacks", missing), ("has unknown", other), ("has other shapes of", sorted(shapes))):
        if names:
            raise ModelError(f"{file}: {problem} {', '.join(names[:3])}; give the weights of MedicalNet's ResNet-50.")
    features.network.load_state_dict(state)
    return features


def _download(repo_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for name in _HUB_FILES:
        try:
            return Path(hf_hub_download(repo_id, name))
        except HFValidationError as error:
            raise ModelError(f"{repo_id}: is neither a file nor a Hub id such as {HUB_ID}.") from error
        except LocalEntryNotFoundError as error:
            raise NetworkError(f"{repo_id}: cannot be reached; give a downloaded file instead.") from error
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            raise NetworkError(f"{repo_id}: cannot be downloaded ({first_line(error)}).") from error
    raise ModelError(f"{repo_id}: has none of {', '.join(_HUB_FILES)}.")


class Med3DKMeans:
    """Mini-batch k-means on a volume's MedicalNet features, brought to the voxels by linear interpolation.

    Args:
        num_parts: number of clusters.
        features: from [`load_med3d`].
        seed: of the clustering.
    """

    name = "Med3D k-means"

    def __init__(self, num_parts: int, features: Med3DFeatures, seed: int = 0):
        self.num_parts, self.features, self.seed = num_parts, features, seed

    def fit(self, volumes: Sequence[dict]) -> None:
        """Nothing to learn: each volume is clustered for itself."""

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Label a (1, H, W, D) volume: (H, W, D) uint8."""
        device = next(self.features.parameters()).device
        coarse = self.features(volume[None].to(device)).cpu()
        clusters = MiniBatchKMeans(self.num_parts, n_init=3, batch_size=4096, random_state=self.seed)
        clusters.fit(coarse[0].flatten(1).T.numpy())
        grid, labels = volume.shape[1:], []
        for plane in range(grid[0]):  # all voxels at once would take 64 times the volume's memory
            fine = upsample_plane(coarse, plane, grid)
            labels.append(clusters.predict(fine[0].flatten(1).T.contiguous().numpy()).reshape(grid[1:]))
        return np.stack(labels).astype(np.uint8)


def upsample_plane(coarse: torch.Tensor, plane: int, grid: Sequence[int]) -> torch.Tensor:
    """One plane (1, C, W, D) of (1, C, h, w, d) features brought to a grid (H, W, D), linear, corners aligned."""
    position = plane * (coarse.shape[2] - 1) / max(grid[0] - 1, 1)
    low = min(int(position), coarse.shape[2] - 1)
    high = min(low + 1, coarse.shape[2] - 1)
    mixed = torch.lerp(coarse[:, :, low], coarse[:, :, high], position - low)
    return F.interpolate(mixed, tuple(grid[1:]), mode="bilinear", align_corners=True)


@dataclass(frozen=True)
class Med3DConfig:
    """Hyper-parameters of [`Med3DDiscovery`].

    Attributes:
        batch_size, steps, learning_rate: of Adam.
        lambda_feature, lambda_visual, lambda_invariance: weights of the losses.
        gamma: range of the exponent of the photometric change.
        dropout: of the segmentation network.
    """

    batch_size: int = 4
    steps: int = 4_500
    learning_rate: float = 3e-4
    lambda_feature: float = 1.0
    lambda_visual: float = 1.0
    lambda_invariance: float = 1.0
    gamma: tuple[float, float] = (0.9, 1.1)
    dropout: float = 0.2


class Med3DDiscovery(TrainedBaseline):
    """The paper's segmentation network and losses (Eq. 4), with MedicalNet features in place of diffusion features.

    Args:
        features: from [`load_med3d`]; the others as for [`TrainedBaseline`].
    """

    name = "Med3D features, our losses"
    presets = {  # noqa: RUF012
        "paper": Med3DConfig(),
        "small": Med3DConfig(batch_size=2, steps=600, learning_rate=1e-3),
    }

    def __init__(self, num_parts: int, features: Med3DFeatures, **options):
        super().__init__(num_parts, **options)
        self.features = features.to(self.device)

    def fit(self, volumes: Sequence[dict], folder: Path | None = None) -> None:
        """See [`TrainedBaseline.fit`]."""
        c = self.config
        network = self.seeded(lambda: StructureDiscoveryModel(self.num_parts, dropout=c.dropout)).to(self.device)

        def loss(_) -> torch.Tensor:
            chosen = torch.randint(len(volumes), (c.batch_size,)).tolist()
            x = torch.stack([volumes[i]["volume"] for i in chosen]).to(self.device)
            low, high = c.gamma
            gamma = (low + (high - low) * torch.rand(len(x), 1, 1, 1, 1)).to(self.device)
            masks = network(x).logits.float().softmax(dim=1)
            changed = network(min_max_normalize(x**gamma, check=False)).logits.float().softmax(dim=1)
            return (
                c.lambda_feature * region_consistency(masks, self.features(x))
                + c.lambda_visual * region_consistency(masks, x)
                + c.lambda_invariance * photometric_invariance(masks, changed)
            )

        schedule = Schedule(c.steps, c.learning_rate)
        settings = {"features": _digest(self.features)}
        self.train(network, loss, schedule, place(folder, f"med3d-{self.num_parts}"), settings)
        self.network = network

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Label a (1, H, W, D) volume: (H, W, D) uint8."""
        return self.network.segment(volume[None]).labels[0].cpu().numpy()


def _digest(features: Med3DFeatures) -> float:
    """A number that changes with the weights."""
    return float(features.network.conv1.weight.double().square().sum())
