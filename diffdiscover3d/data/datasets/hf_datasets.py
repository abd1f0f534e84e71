"""`load_dataset`: synthetic cells, BraTS, the authors' archive or a folder of scans, the Hugging Face way."""


def load_dataset(
    name_or_path: str,
    *,
    split: str | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    kind: str | None = None,
    **options,
):
    """Load volumes as a dataset of the `datasets` library.

    Args:
        name_or_path: "synthetic-regular" or "synthetic-irregular"; the folder of a BraTS edition or of the authors'
            archive, recognised by themselves; or a folder, glob, text list or file of NIfTI volumes.
        split: "train", "validation" or "test"; default: all there are, by name.
        streaming: yield examples one by one without writing a cache.
        cache_dir: of the `datasets` library.
        num_proc: processes that prepare the cache.
        kind: "brats", "authors-archive" or "folder", where a folder should not be recognised by itself.
        options: of BraTS: `modalities` (a name, several, or "all"; default flair), `grade` (HGG, LGG, all;
            default HGG), `labels` (False for sets without masks), `split_seed`; they split as [`BraTSOptions`] does.

    Returns:
        `DatasetDict` or `Dataset`; when streaming their iterable kin. Synthetic cells have arrays `volume` and
        `labels`, files are `Nifti` columns that keep their affine.

    Raises:
        InputError: if there are no such files, or a BraTS case lacks one.
        ValueError: for an unknown split or option.
        ImportError: if the `datasets` library is not installed.

    Example:
        >>> cells = load_dataset("synthetic-regular", split="test", streaming=True)
        >>> next(iter(cells))["name"]
        'regular-test-000'
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("load_dataset needs the datasets library: pip install 'diffdiscover3d[datasets]'.") from error
    from diffdiscover3d.data.datasets.builders import make_builder
    from diffdiscover3d.errors import DiffDiscoverError

    builder = make_builder(str(name_or_path), cache_dir, kind, **options)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    try:
        builder.download_and_prepare(num_proc=num_proc)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DiffDiscoverError):
            raise error.__cause__ from None
        raise
    return builder.as_dataset(split=split)
