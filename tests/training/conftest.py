"""What the tests of trainings share."""

import pytest
from accelerate.state import AcceleratorState, PartialState


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Each test may choose its precision: in one process accelerate keeps the first, as its own tests know."""
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()
