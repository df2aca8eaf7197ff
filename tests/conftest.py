"""Fixtures on the golden checkpoints. Loaded models are shared: a test that changes one loads its own."""

import os
import signal


os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it: no test may look at the network

import pytest
import torch
from support import CHAT_CASES, Golden

from viscpm_hf import CpmBeeTokenizer, VisCPMChat, VisCPMChatForConditionalGeneration, VisCPMChatProcessor


# A run in the background is started with SIGINT ignored, and what is tested answers it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", params=CHAT_CASES)
def golden(request) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="session")
def chat(golden) -> VisCPMChat:
    """VisCPM-Chat from the original file."""
    return golden.load_chat()


@pytest.fixture(scope="session")
def model(chat) -> VisCPMChatForConditionalGeneration:
    return chat.model


@pytest.fixture(scope="session")
def processor(chat) -> VisCPMChatProcessor:
    return chat.processor


@pytest.fixture(scope="session")
def tokenizer(golden) -> CpmBeeTokenizer:
    return CpmBeeTokenizer(str(golden.vocab))


@pytest.fixture
def own_chat(golden) -> VisCPMChat:
    """As `chat`, for a test that changes the model."""
    return golden.load_chat()


@pytest.fixture(scope="session")
def saved_folder(golden, chat, tmp_path_factory):
    """The checkpoint as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("saved") / golden.name
    chat.model.save_pretrained(folder)
    chat.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def original_folder(golden, tmp_path_factory):
    """The checkpoint in the layout of its Hub repository."""
    return golden.write_layout(tmp_path_factory.mktemp("original") / golden.name)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
