"""Builders for the `datasets` library: synthetic cells, BraTS, the authors' archive and folders of scans.

Requires the extra `datasets`. Each dataset is an Arrow dataset in the library's cache, with a key that identifies its
content.
"""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets
import nibabel as nib
import numpy as np
import torch

from diffdiscover3d.data.cache import CachedVolumes
from diffdiscover3d.data.datasets import authors_archive, brats, synthetic
from diffdiscover3d.data.datasets.columns import VOLUME
from diffdiscover3d.data.datasets.listing import list_volumes
from diffdiscover3d.data.formats.nifti.reading import as_volume_tensor
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import files_of, is_nifti
from diffdiscover3d.data.formats.volume_file import nifti_header
from diffdiscover3d.data.transforms import min_max_normalize
from diffdiscover3d.errors import InputError

_VOLUME_COLUMNS = (VOLUME, "image", *brats.MODALITIES)  # the others are those of datasets of earlier versions


class SyntheticCells(datasets.GeneratorBasedBuilder):
    """The synthetic cells of [`synthesize`], unnormalised; configs "regular" and "irregular".

    Columns: `name`, `volume` (50, 50, 50) float32, `labels` (3, 50, 50, 50) uint8.
    """

    # the version is part of the cache path, so a new generator version does not reuse old volumes
    BUILDER_CONFIGS: ClassVar = [
        datasets.BuilderConfig(name=variant, version=f"{synthetic.GENERATOR_VERSION}.0.0")
        for variant in synthetic.VARIANTS
    ]

    def _info(self):
        return _array_info(synthetic.SHAPE, f"Synthetic cells, {self.config.name} variant.")

    def _split_generators(self, _):
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"split": split, "indices": list(range(count))})
            for split, count in synthetic.SPLITS.items()
        ]

    def _generate_examples(self, split: str, indices: list[int]) -> Iterator[tuple[str, dict]]:
        for index in indices:
            sample = synthetic.synthesize(self.config.name, split, index)
            name = f"{self.config.name}-{split}-{index:03d}"
            yield name, {"name": name, "volume": sample.volume, "labels": sample.labels}


@dataclass
class _FilesConfig(datasets.BuilderConfig):
    """Files and options of a dataset; `fingerprint` changes when a file changes."""

    root: str = ""
    fingerprint: str = ""
    modalities: tuple[str, ...] = ("flair",)
    grade: str = "HGG"  # must equal the default of `BraTSOptions`, which determines the split
    labels: bool = True
    split_seed: int = 0


class BraTS(datasets.GeneratorBasedBuilder):
    """A BraTS folder in any layout, with the splits of [`split_cases`].

    Columns: `id`, `edition`, `grade`, the `Nifti` column `volume` (the first modality); of several modalities one
    `Nifti` column each; and, with `labels`, the `Nifti` columns `labels` (as in the file) and `whole_tumour` (1 where a
    label is above 0).
    """

    BUILDER_CONFIG_CLASS = _FilesConfig

    def _info(self):
        columns = {name: datasets.Value("string") for name in ("id", "edition", "grade")}
        columns |= {name: datasets.Nifti() for name in (VOLUME, *self._named())}
        if self.config.labels:
            columns |= {"labels": datasets.Nifti(), "whole_tumour": datasets.Nifti()}
        return datasets.DatasetInfo(description="BraTS", features=datasets.Features(columns))

    def _named(self) -> tuple[str, ...]:
        """The modalities that have columns of their own."""
        return self.config.modalities if len(self.config.modalities) > 1 else ()

    def _split_generators(self, _):
        config = self.config
        splits = brats.split_cases(brats.find_cases(config.root, config.grade), config.split_seed)
        for case in (case for side in splits.values() for case in side):  # fail fast on missing files
            for modality in config.modalities:
                case.image(modality)
            if config.labels and case.mask is None:
                try:
                    case.require_mask()
                except InputError as error:
                    raise InputError(f"{error} Use labels=False to load without masks.") from error
        ids = {name: [case.id for case in side] for name, side in splits.items()}
        return [
            datasets.SplitGenerator(name=name, gen_kwargs={"ids": members}) for name, members in ids.items() if members
        ]

    def _generate_examples(self, ids: list[str]) -> Iterator[tuple[str, dict]]:
        config = self.config
        cases = {case.id: case for case in brats.find_cases(config.root, config.grade)}
        for name in ids:
            case = cases[name]
            row = {"id": case.id, "edition": case.edition, "grade": case.grade}
            for column, modality in ((VOLUME, config.modalities[0]), *((name, name) for name in self._named())):
                row[column] = _channel(case, modality) if case.edition == "MSD" else str(case.image(modality))
            if config.labels:
                image = nib.load(case.image(config.modalities[0]))
                mask = nib.load(case.require_mask())
                if mask.shape != image.shape[:3]:
                    raise InputError(
                        f"{case.mask}: has shape {mask.shape}, the image {image.shape[:3]}; they must be equal. "
                        "Download the case again."
                    )
                tumour = (np.asarray(mask.dataobj) > 0).astype(np.uint8)
                header = mask.header.copy()
                header.set_data_dtype(np.uint8)
                header.set_slope_inter(1, 0)
                row |= {"labels": str(case.mask), "whole_tumour": _pack(nib.Nifti1Image(tumour, None, header))}
            yield name, row


class AuthorsArchive(datasets.GeneratorBasedBuilder):
    """The authors' pickled synthetic cells, read by a restricted unpickler; columns as for [`SyntheticCells`]."""

    BUILDER_CONFIG_CLASS = _FilesConfig

    def _info(self):
        split, indices = next(iter(authors_archive.list_archive(self.config.root).items()))
        volume, _ = authors_archive.read_archive_volume(self.config.root, split, indices[0])
        return _array_info(volume.shape, "The authors' synthetic cells.")

    def _split_generators(self, _):
        found = authors_archive.list_archive(self.config.root)
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"split": split, "indices": indices})
            for split, indices in found.items()
        ]

    def _generate_examples(self, split: str, indices: list[int]) -> Iterator[tuple[str, dict]]:
        for index in indices:
            volume, labels = authors_archive.read_archive_volume(self.config.root, split, index)
            name = f"{split}-{index:03d}"
            yield name, {"name": name, "volume": volume, "labels": labels}


class NiftiFolder(datasets.GeneratorBasedBuilder):
    """Volumes as [`list_volumes`] finds them, one split "train"; columns `name` and `volume`.

    Those of other formats become NIfTI images in canonical orientation.
    """

    BUILDER_CONFIG_CLASS = _FilesConfig

    def _info(self):
        columns = {"name": datasets.Value("string"), VOLUME: datasets.Nifti()}
        return datasets.DatasetInfo(description="Volumes", features=datasets.Features(columns))

    def _split_generators(self, _):
        paths = [str(p) for p in list_volumes(self.config.root)]
        return [datasets.SplitGenerator(name="train", gen_kwargs={"paths": paths})]

    def _generate_examples(self, paths: list[str]) -> Iterator[tuple[str, dict]]:
        for path in paths:
            yield path, {"name": Path(path).name, VOLUME: path if is_nifti(path) else _converted(path)}


def make_builder(name_or_path: str, cache_dir: str | None, kind: str | None, **options):
    """Create the builder of a dataset; see [`diffdiscover3d.load_dataset`]."""
    variant = name_or_path.removeprefix("synthetic-")
    if kind is None and name_or_path.startswith("synthetic-") and variant in synthetic.VARIANTS:
        if options:
            raise ValueError(f"synthetic cells have no options, got {sorted(options)}.")
        return SyntheticCells(config_name=variant, cache_dir=cache_dir, dataset_name="diffdiscover3d-synthetic")
    if kind is None:
        root = Path(name_or_path)
        archive = any((root / split / "im_0.p").is_file() for split in authors_archive.SPLITS)
        archive = archive or any(next((root / s).glob("im_*.p"), None) for s in authors_archive.SPLITS)
        kind = "authors-archive" if archive else "brats" if brats.is_brats(root) else "folder"
    builders = {"brats": BraTS, "authors-archive": AuthorsArchive, "folder": NiftiFolder}
    if kind not in builders:
        raise ValueError(f"`kind` must be one of {tuple(builders)}, got {kind!r}.")
    if options and kind != "brats":
        raise ValueError(f"datasets of kind {kind!r} have no options, got {sorted(options)}.")
    if kind == "brats":
        options = _brats_options(**options)
        paths = [p for c in brats.find_cases(name_or_path) for p in (*c.images.values(), c.mask) if p is not None]
    elif kind == "authors-archive":
        authors_archive.list_archive(name_or_path)
        paths = sorted(Path(name_or_path).glob("*/*.p"))
    else:
        paths = [file for path in list_volumes(name_or_path) for file in files_of(path)]
    stamps = [_stamp(p) for p in sorted(set(paths))]
    root = name_or_path if kind == "folder" and not Path(name_or_path).exists() else str(Path(name_or_path).absolute())
    fingerprint = datasets.fingerprint.Hasher.hash(stamps)
    where = {"cache_dir": cache_dir, "dataset_name": f"diffdiscover3d-{kind}"}
    return builders[kind](**where, root=root, fingerprint=fingerprint, **options)


def _stamp(path: Path) -> tuple:
    """Changes with the content of a file: a program can set the time of modification, but not that of the inode."""
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def as_training_volumes(dataset: "datasets.Dataset", cache: str | Path | None = None) -> CachedVolumes:
    """Convert to a cached map-style dataset of normalised volumes for training.

    Args:
        dataset: a dataset with a column `volume` of arrays, or of `Nifti` images, which are reoriented to RAS+; in
            datasets of earlier versions it is called `image` or after a modality.
        cache: folder of the cache files.

    Returns:
        Items `{"volume": (1, H, W, D) float32 in [0, 1], "name": str}`, with "labels", (L, H, W, D) uint8, if the
        dataset has label arrays.

    Raises:
        InputError: if none of these columns exists.
    """
    column = next((c for c in _VOLUME_COLUMNS if c in dataset.column_names), None)
    if column is None:
        raise InputError(f"the dataset has the columns {dataset.column_names}; one of {_VOLUME_COLUMNS} is required.")
    return CachedVolumes(len(dataset), _TrainingItem(dataset, column), [1, column, dataset._fingerprint], cache)


@dataclass
class _TrainingItem:
    """Converts a row to a training item; a class, so that it can be pickled for data-loading workers."""

    dataset: "datasets.Dataset"
    column: str

    def __call__(self, index: int) -> dict:
        row = self.dataset.with_format(None)[index]
        volume = row[self.column]
        volume = volume if isinstance(volume, nib.Nifti1Image) else np.asarray(volume, np.float32)
        name = row.get("name") or row.get("id") or f"{index:06d}"
        item = {"volume": min_max_normalize(as_volume_tensor(volume)[0]), "name": str(name)}
        if not isinstance(self.dataset.features.get("labels"), datasets.Nifti | None):
            item["labels"] = torch.from_numpy(np.asarray(row["labels"], dtype=np.uint8))
        return item


def _brats_options(modalities=("flair",), grade: str = "HGG", labels: bool = True, split_seed: int = 0) -> dict:
    names = brats.MODALITIES if modalities == "all" else (modalities,) if isinstance(modalities, str) else modalities
    names = tuple(brats.BraTSOptions(modality=name).modality for name in names)
    brats.BraTSOptions(grade=grade)
    return {"modalities": names, "grade": grade, "labels": bool(labels), "split_seed": int(split_seed)}


def _array_info(shape, description: str) -> datasets.DatasetInfo:
    columns = {
        "name": datasets.Value("string"),
        "volume": datasets.Array3D(tuple(shape), "float32"),
        "labels": datasets.Array4D((len(synthetic.LEVEL_PARTS), *shape), "uint8"),
    }
    return datasets.DatasetInfo(description=description, features=datasets.Features(columns))


def _channel(case: brats.BraTSCase, modality: str) -> bytes:
    """One modality of an MSD file as a separate NIfTI file."""
    return _pack(nib.load(case.image(modality)).slicer[..., brats.MODALITIES.index(modality)])


def _converted(path: str) -> bytes:
    """A volume of another format as NIfTI."""
    volume = read_volume(path)
    image = nib.Nifti1Image(volume.data, None, nifti_header(volume.affine, volume.data.shape))
    image.set_data_dtype(np.float32)
    return _pack(image)


def _pack(image: nib.Nifti1Image) -> bytes:
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
