"""`load_dataset`: synthetic cells, BraTS, the authors' archive or a folder of scans as a Hugging Face dataset."""


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
            archive, detected automatically; or a folder, glob, text list or file of volumes.
        split: "train", "validation" or "test"; default: a dict of all splits.
        streaming: iterate over the examples without writing a cache.
        cache_dir: cache folder of the `datasets` library.
        num_proc: number of processes that prepare the cache.
        kind: "brats", "authors-archive" or "folder", to override the automatic detection.
        options: options of BraTS: `modalities` (a name, several names, or "all"; default flair), `grade` (HGG, LGG or
            all; default HGG), `labels` (False for data without masks) and `split_seed`. The splits are those of
            [`BraTSOptions`].

    Returns:
        A `DatasetDict` or `Dataset`, or the iterable equivalent when streaming. The column `volume` has the volumes of
        every dataset: arrays of synthetic cells, otherwise images with the affine of their files, which
        `with_format("torch")` converts to (H, W, D) float32 tensors in RAS+ orientation. Of several modalities of
        BraTS, `volume` is the first, and each is also a column of its own name.

    Raises:
        InputError: if the files do not exist, or a file of a BraTS case is missing.
        ValueError: if the split or an option is unknown.
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
    from diffdiscover3d.data.datasets.columns import with_formats
    from diffdiscover3d.errors import DiffDiscoverError

    builder = make_builder(str(name_or_path), cache_dir, kind, **options)
    if streaming:
        return with_formats(builder.as_streaming_dataset(split=split))
    try:
        builder.download_and_prepare(num_proc=num_proc)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DiffDiscoverError):
            raise error.__cause__ from None
        raise
    return with_formats(builder.as_dataset(split=split))
