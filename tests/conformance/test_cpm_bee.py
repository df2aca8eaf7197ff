"""transformers' own suite on the language model."""

import unittest
from functools import partialmethod
from unittest.mock import patch

from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.testing_utils import torch_device

from viscpm_hf import CpmBeeConfig, CpmBeeForCausalLM, CpmBeeModel
from viscpm_hf.modeling.modeling_cpm_bee import CpmBeePreTrainedModel
from viscpm_hf.modeling.token_ids_cpm_bee import padded_vocab_size


class CpmBeeModelTester:
    def __init__(self, parent):
        self.parent = parent
        self.batch_size = 13
        self.seq_length = 7
        self.num_words = 99
        self.num_added_tokens = 0
        self.hidden_size = 32
        self.intermediate_size = 37
        self.num_hidden_layers = 2
        self.num_attention_heads = 4
        self.head_dim = 8
        self.is_training = True

    def get_config(self) -> CpmBeeConfig:
        return CpmBeeConfig(
            num_words=self.num_words,
            vocab_size=padded_vocab_size(self.num_words) + self.num_added_tokens,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            head_dim=self.head_dim,
            position_bias_num_buckets=16,
            position_bias_num_segment_buckets=16,
            position_bias_max_distance=32,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        inputs = {
            "input_ids": ids_tensor(shape, self.num_words).to(torch_device),
            "attention_mask": random_attention_mask(shape).to(torch_device),
        }
        return self.get_config(), inputs


class CpmBeeModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (CpmBeeModel, CpmBeeForCausalLM)
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = CpmBeeModelTester(self)
        self.config_tester = ConfigTester(self, config_class=CpmBeeConfig, hidden_size=32)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_resize_tokens_embeddings(self):
        """With added tokens for the suite to take away: the ids below them are slots, which need a table."""
        self.model_tester.num_added_tokens = 16
        super().test_resize_tokens_embeddings()

    def test_reverse_loading_mapping(self, **kwargs):
        """Our models are saved with today's names; asked for the original's, they must write those. There are
        three: a checkpoint keeps its own, and a new model is given those of the Hub's class."""

        def written_conversions(*args, **kwargs):
            conversions = get_model_conversion_mapping(*args, **kwargs)
            return [entry for entry in conversions if entry.source_patterns[0].startswith(r"^cpmbee\.")]

        save = partialmethod(CpmBeePreTrainedModel.save_pretrained, save_original_format=True)
        with (
            patch.object(CpmBeePreTrainedModel, "save_pretrained", save),
            patch("tests.test_modeling_common.get_model_conversion_mapping", written_conversions),
        ):
            super().test_reverse_loading_mapping(skip_base_model=True)
