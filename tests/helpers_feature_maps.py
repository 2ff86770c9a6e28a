"""Feature maps and inputs that the tests of maps and of their fitting share."""

import pytest
import torch

from recur_gpt2.ops.feature_maps import FEATURE_MAPS, make_feature_map

HEADS, WIDTH, SIZE = 3, 8, 6
every_map = pytest.mark.parametrize("name", FEATURE_MAPS)


def random_map(name, size=SIZE, dtype=torch.float64):
    """A map with no parameter where it started."""
    feature_map = make_feature_map(name, HEADS, WIDTH, size).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in feature_map.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return feature_map


def random_inputs(*shape, seed=0, dtype=torch.float64):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
