"""Exit codes: the documented one for every kind of error."""

import sys

import pytest
import torch

from diffdiscover3d import errors
from diffdiscover3d.cli.app import main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InputError("x"), 3),
        (errors.OutputError("x"), 4),
        (PermissionError(13, "denied"), 4),
        (errors.ModelError("x"), 5),
        (errors.NetworkError("x"), 6),
        (errors.MemoryLimitError("x"), 7),
        (MemoryError(), 7),
        (torch.OutOfMemoryError("x"), 7),
        (ValueError("x"), 2),
    ],
)
def test_every_error_has_its_code_and_one_line(error, code, monkeypatch, capsys):
    assert isinstance(error, errors.expected_errors()) and errors.exit_code(error) == code

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("diffdiscover3d.hub.registry.embedded_models", fail)
    monkeypatch.setattr(sys, "argv", ["diffdiscover3d", "models", "list"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > len("error: ")
