"""transformers' own suite on VisCPM's siblings: one composite, each of them a configuration of it."""

import unittest

from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from transformers.testing_utils import torch_device

from viscpm_hf.modeling.configuration_vision_resampler import MiniCPMVConfig, OmniLMMConfig, VisualCLAConfig
from viscpm_hf.modeling.modeling_vision_resampler import (
    MiniCPMVForConditionalGeneration,
    OmniLMMForConditionalGeneration,
    VisualCLAForConditionalGeneration,
)


TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "num_channels": 3,
}  # fmt: skip
PERCEIVER = {"num_query_tokens": 4, "hidden_size": 32, "num_attention_heads": 2}


class SiblingModelTester:
    """One image of one view per row; its placeholders are within the vocabulary, where the suite can draw them."""

    def __init__(self, parent, config_class, text, vision, resampler):
        self.parent = parent
        self.config_class = config_class
        self.text, self.vision, self.resampler = text, vision, resampler
        self.batch_size = 3
        self.num_channels = VISION["num_channels"]
        self.image_size = VISION["image_size"]
        self.num_image_tokens = resampler["num_query_tokens"]
        self.seq_length = 7 + self.num_image_tokens
        self.encoder_seq_length = self.seq_length
        self.hidden_size = TEXT["hidden_size"]
        self.num_hidden_layers = TEXT["num_hidden_layers"]
        self.num_attention_heads = TEXT["num_attention_heads"]
        self.image_token_id = 4
        self.is_training = True

    def get_config(self):
        return self.config_class(
            text_config={**TEXT, **self.text},
            vision_config={**VISION, **self.vision},
            resampler_config=self.resampler,
            image_token_id=self.image_token_id,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        # Ids above the special ones, so that a placeholder stands nowhere else.
        input_ids = ids_tensor([self.batch_size, self.seq_length], config.text_config.vocab_size - 10) + 10
        input_ids[:, : self.num_image_tokens] = self.image_token_id
        inputs = {
            "pixel_values": pixel_values,
            "input_ids": input_ids,
            "attention_mask": input_ids.new_ones(input_ids.shape),
        }
        return config, {name: value.to(torch_device) for name, value in inputs.items()}


class SiblingModelTest(ModelTesterMixin, GenerationTesterMixin):
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True
    config_class: type
    text: dict
    vision: dict
    resampler: dict

    def setUp(self):
        self.model_tester = SiblingModelTester(self, self.config_class, self.text, self.vision, self.resampler)
        self.config_tester = ConfigTester(self, config_class=self.config_class, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()


class OmniLMMModelTest(SiblingModelTest, unittest.TestCase):
    all_model_classes = (OmniLMMForConditionalGeneration,)
    config_class = OmniLMMConfig
    text = {"model_type": "mistral"}
    vision = {"model_type": "vit"}
    resampler = {**PERCEIVER, "key_positions": "interpolated"}


class MiniCPMV1ModelTest(SiblingModelTest, unittest.TestCase):
    all_model_classes = (MiniCPMVForConditionalGeneration,)
    config_class = MiniCPMVConfig
    text = {"model_type": "granite"}
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False}
    resampler = {**PERCEIVER, "key_positions": "interpolated"}


class MiniCPMV2ModelTest(MiniCPMV1ModelTest):
    resampler = {**PERCEIVER, "key_positions": "computed"}


class VisualCLAModelTest(SiblingModelTest, unittest.TestCase):
    all_model_classes = (VisualCLAForConditionalGeneration,)
    test_can_init_all_missing_weights_before_2023 = False
    config_class = VisualCLAConfig
    text = {"model_type": "llama"}
    vision = {"model_type": "clip_vision_model"}
    resampler = {
        "resampler_type": "concatenating", "num_query_tokens": 4, "hidden_size": 32, "num_attention_heads": 2,
        "num_hidden_layers": 2, "intermediate_size": 37,
    }  # fmt: skip
