"""transformers' own suite on the tokenizer, the image processor and the processor."""

import unittest
from pathlib import Path

from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from tests.test_processing_common import ProcessorTesterMixin
from tests.test_tokenization_common import TokenizerTesterMixin

from viscpm_hf import CpmBeeTokenizer, VisCPMChatProcessor, VisCPMImageProcessor


VOCAB = Path(__file__).parents[1] / "golden" / "chat_a" / "vocab.txt"


class CpmBeeTokenizationTest(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = CpmBeeTokenizer

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        CpmBeeTokenizer(str(VOCAB)).save_pretrained(cls.tmpdirname)


class VisCPMImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"height": 18, "width": 18})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": VisCPMImageProcessor}


class VisCPMImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = VisCPMImageProcessingTester


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
