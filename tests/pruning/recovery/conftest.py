"""What tests of training share."""

import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture
def one_thread():
    """Sums in one order, so that bits can be compared; and nothing of accelerate left behind."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)
