"""transformers' own suite on VisCPM-Chat."""

import tempfile
import unittest
from functools import partialmethod
from unittest.mock import patch

from test_beit3 import Beit3ModelTester
from test_cpm_bee import CpmBeeModelTester
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.testing_utils import torch_device

from viscpm_hf import VisCPMChatConfig, VisCPMChatForConditionalGeneration, VisCPMChatModel
from viscpm_hf.modeling.modeling_cpm_bee import CpmBeePreTrainedModel


class VisCPMChatModelTester:
    """One image per row; its placeholders are within the vocabulary, where the suite can draw and forbid them."""

    def __init__(self, parent):
        self.parent = parent
        self.text = CpmBeeModelTester(parent)
        self.vision = Beit3ModelTester(parent)
        self.batch_size = 7  # what the suite compares; rows that it adds have an image and no placeholders
        self.num_channels = self.vision.num_channels
        self.image_size = self.vision.image_size
        self.num_image_tokens = self.vision.num_query_tokens
        self.seq_length = 7 + self.num_image_tokens
        self.encoder_seq_length = self.seq_length
        self.hidden_size = self.text.hidden_size
        self.num_hidden_layers = self.text.num_hidden_layers
        self.num_attention_heads = self.text.num_attention_heads
        self.image_token_id = 4
        self.is_training = True

    def get_config(self) -> VisCPMChatConfig:
        return VisCPMChatConfig(
            text_config=self.text.get_config(),
            vision_config=self.vision.get_config(),
            image_token_id=self.image_token_id,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        # Ids above the special ones, so that a placeholder stands nowhere else.
        input_ids = ids_tensor([self.batch_size, self.seq_length], config.text_config.num_words - 10) + 10
        input_ids[:, : self.num_image_tokens] = self.image_token_id
        inputs = {
            "pixel_values": pixel_values,
            "input_ids": input_ids,
            "attention_mask": input_ids.new_ones(input_ids.shape),
        }
        return config, {name: value.to(torch_device) for name, value in inputs.items()}


class VisCPMChatConfigTester(ConfigTester):
    def create_and_test_config_from_pretrained_custom_kwargs(self):
        """With more tokens than were saved, where the suite asks for 20: words and their slots take more."""
        config = self.parent.model_tester.get_config()
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            reloaded = VisCPMChatConfig.from_pretrained(folder, text_config={"vocab_size": 1024})
        expected = {**config.text_config.to_dict(), "vocab_size": 1024}
        self.parent.assertDictEqual(reloaded.text_config.to_dict(), expected)


class VisCPMChatModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (VisCPMChatModel, VisCPMChatForConditionalGeneration)
    test_can_init_all_missing_weights_before_2023 = True
    additional_model_inputs = ["pixel_values"]
    test_all_params_have_gradient = False  # the last image expert of the tower feeds keys and values only
    _is_composite = True

    def setUp(self):
        self.model_tester = VisCPMChatModelTester(self)
        self.config_tester = VisCPMChatConfigTester(self, config_class=VisCPMChatConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_resize_tokens_embeddings(self):
        """With added tokens for the suite to take away: the ids below them are slots, which need a table."""
        self.model_tester.text.num_added_tokens = 16
        super().test_resize_tokens_embeddings()

    def test_reverse_loading_mapping(self, **kwargs):
        """Our models are saved with today's names; asked for the original's, they must write those."""

        def written_conversions(*args, **kwargs):
            conversions = get_model_conversion_mapping(*args, **kwargs)
            return [entry for entry in conversions if "embed_tokens" not in entry.source_patterns[0]]

        save = partialmethod(CpmBeePreTrainedModel.save_pretrained, save_original_format=True)
        with (
            patch.object(CpmBeePreTrainedModel, "save_pretrained", save),
            patch("tests.test_modeling_common.get_model_conversion_mapping", written_conversions),
        ):
            super().test_reverse_loading_mapping(skip_base_model=True)
