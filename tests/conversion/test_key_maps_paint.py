"""The maps of VisCPM-Paint's files: every tensor has one place."""

import pytest
import torch
from paint_support import PAINT, components

from viscpm_hf.checkpoints.weight_transforms import KeyMatcher, apply_operation, revert_operation
from viscpm_hf.families import key_maps


def places(state_dict, key_map):
    matcher = KeyMatcher(key_map)
    return [matcher.match(name)[0] for name in state_dict if matcher.match(name) and not matcher.dropped_reason(name)]


@pytest.mark.parametrize(
    ("file", "component", "key_map"),
    [
        ("pytorch_model.bin", "text_encoder", key_maps.PAINT_TEXT_ENCODER),
        ("pytorch_model.bin", "unet", key_maps.PAINT_UNET),
        ("vae.bin", "vae", key_maps.VAE),
    ],
)
def test_every_tensor_has_its_place(file, component, key_map):
    state_dict = torch.load(PAINT / file, weights_only=True)
    found = places(state_dict, key_map)
    assert len(set(found)) == len(found)
    assert set(found) == set(components()[component].state_dict())


def test_the_two_maps_of_the_file_share_nothing():
    state_dict = torch.load(PAINT / "pytorch_model.bin", weights_only=True)
    text, unet = (KeyMatcher(key_map) for key_map in (key_maps.PAINT_TEXT_ENCODER, key_maps.PAINT_UNET))
    for name in state_dict:
        assert (text.match(name) is None) != (unet.match(name) is None), name
        assert (text.dropped_reason(name) is None) == (unet.match(name) is None), name


def test_a_convolution_becomes_a_matrix_once():
    weight = torch.randn(3, 5, 1, 1)
    matrix = apply_operation(key_maps.AS_MATRIX, weight)
    assert torch.equal(matrix, weight[:, :, 0, 0])
    assert apply_operation(key_maps.AS_MATRIX, matrix) is matrix
    assert revert_operation(key_maps.AS_MATRIX, matrix) is matrix


def test_new_names_of_the_vae_stay():
    matcher = KeyMatcher(key_maps.VAE)
    for name in components()["vae"].state_dict():
        assert matcher.match(name)[0] == name
