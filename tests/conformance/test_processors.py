"""transformers' own suite on the tokenizer, the image processor and the processor."""

import json
import textwrap
import unittest
from pathlib import Path
from unittest.mock import patch

from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from tests.test_processing_common import ProcessorTesterMixin
from tests.test_tokenization_common import TokenizerTesterMixin

from viscpm_hf import CpmBeeTokenizer, VisCPMChatProcessor, VisCPMImageProcessor


GOLDEN = Path(__file__).parents[1] / "golden" / "chat_a"
VOCAB = GOLDEN / "vocab.txt"
TOKENIZED = json.loads((GOLDEN / "expected.json").read_text("utf-8"))["tokenize"][0]


class CpmBeeTokenizationTest(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = CpmBeeTokenizer
    test_tokenizer_from_extractor = False  # it reads a tokenizer.json
    integration_test_input_string = TOKENIZED["text"]
    integration_expected_tokens = TOKENIZED["tokens"]
    integration_expected_token_ids = TOKENIZED["ids"]
    integration_expected_decoded_text = TOKENIZED["decoded"]

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        CpmBeeTokenizer(str(VOCAB)).save_pretrained(cls.tmpdirname)
        cls.from_pretrained_id = [cls.tmpdirname]


class VisCPMImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"height": 18, "width": 18})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": VisCPMImageProcessor}


class VisCPMImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = VisCPMImageProcessingTester

    def test_pil_can_run_without_torchvision(self):
        """The test's own process has to know our class."""

        def dedent(script):
            return textwrap.dedent(script).replace("from transformers", "import viscpm_hf\nfrom transformers", 1)

        with patch("tests.test_image_processing_common.textwrap") as patched:
            patched.dedent = dedent
            super().test_pil_can_run_without_torchvision()


class VisCPMChatProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = VisCPMChatProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return CpmBeeTokenizer(str(VOCAB))

    @classmethod
    def _setup_image_processor(cls):
        return VisCPMImageProcessor(size={"height": 18, "width": 18})

    @staticmethod
    def prepare_processor_dict():
        return {"num_query_tokens": 5}
