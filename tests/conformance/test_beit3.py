"""transformers' own suite on the vision tower."""

import copy
import unittest

from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor
from torch import nn
from transformers.testing_utils import torch_device

from viscpm_hf import Beit3Config, Beit3Model


class Beit3ModelTester:
    def __init__(self, parent):
        self.parent = parent
        self.batch_size = 3
        self.num_channels = 3
        self.image_size = 16
        self.patch_size = 8
        self.num_query_tokens = 5
        self.hidden_size = 32
        self.intermediate_size = 37
        self.num_hidden_layers = 2
        self.num_attention_heads = 4
        self.is_training = True
        # Of the hidden states and attentions: image tokens, then queries.
        self.seq_length = (self.image_size // self.patch_size) ** 2 + 1 + self.num_query_tokens

    def get_config(self) -> Beit3Config:
        return Beit3Config(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            num_query_tokens=self.num_query_tokens,
            max_query_positions=self.num_query_tokens + 2,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": floats_tensor(shape).to(torch_device)}


class Beit3ModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (Beit3Model,)
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = Beit3ModelTester(self)
        self.config_tester = ConfigTester(self, config_class=Beit3Config, has_text_modality=False, hidden_size=32)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        """As transformers' own vision towers have it: the input embeddings are a convolution."""
        model = Beit3Model(copy.deepcopy(self.model_tester.get_config()))
        self.assertIsInstance(model.get_input_embeddings(), nn.Conv2d)
        replacement = nn.Conv2d(3, 32, kernel_size=8)
        model.set_input_embeddings(replacement)
        self.assertIs(model.get_input_embeddings(), replacement)
        self.assertIsNone(model.get_output_embeddings())
