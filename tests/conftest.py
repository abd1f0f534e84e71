"""Shared fixtures."""

import os
import signal
import sys

if "DIFFDISCOVER3D_TEST_CUDA" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests outside tests/cuda compare bits and times of a CPU
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU; read when Triton is imported

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a worker for each core

import nibabel as nib
import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Reset accelerate's state, which otherwise keeps the first mixed precision of the process."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state()
        state.PartialState._reset_state()


@pytest.fixture
def default_hangup():
    """Restore the default action of SIGHUP, which is ignored if the tests were started by `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def make_nifti():
    """Write an array as NIfTI: `make_nifti(path, array, affine, mod=...)`; `mod` may change the header first."""

    def make(path, array, affine=None, mod=None, kind=nib.Nifti1Image):
        image = kind(array, np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine)
        if mod:
            mod(image.header)
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, path)
        return path

    return make


@pytest.fixture(scope="session")
def tiny_discovery(tmp_path_factory):
    """Folder of an untrained, seeded discovery network of three parts."""
    from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel

    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = StructureDiscoveryModel(num_parts=3)
        with torch.no_grad():  # the batch statistics of a few volumes make its parts differ
            for _ in range(20):
                model.train()(torch.rand(2, 1, 16, 16, 16))
        model.eval().save_pretrained(folder)
    return folder
