"""The fuzz targets, for a moment; CI runs them for longer (`make fuzz`)."""

import pytest
from fuzz import TARGETS, run


@pytest.mark.parametrize("target", TARGETS)
def test_spoilt_files(target):
    assert run(target, seconds=2.0, seed=0) > 3
