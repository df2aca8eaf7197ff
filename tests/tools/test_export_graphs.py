"""torch.export and ONNX of the vision tower and of CPM-Bee's prefill, at lengths that were not seen when exporting."""

import pytest
import torch

from viscpm_hf import CpmBeeForCausalLM, CpmBeeTokenizer, VisCPMChatForConditionalGeneration


TEXTS = ["What colour is it?", "How many shapes are there in the picture? 红色的圆形。"]


@pytest.fixture(scope="module")
def tower(chat_folder):
    chat = VisCPMChatForConditionalGeneration.from_pretrained(chat_folder, dtype=torch.float32)
    return chat.model.vision_tower.eval()


@pytest.fixture(scope="module")
def bee(bee_folder):
    return CpmBeeForCausalLM.from_pretrained(bee_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def texts(bee_folder) -> list[dict[str, torch.Tensor]]:
    tokenizer = CpmBeeTokenizer.from_pretrained(bee_folder)
    encoded = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    return [{name: each[name] for name in ("input_ids", "attention_mask")} for each in encoded]


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(1, 3, 64, 64)


LENGTH = torch.export.Dim("length", min=2, max=4096)
SHAPES = {"input_ids": {1: LENGTH}, "attention_mask": {1: LENGTH}, "use_cache": None}


@torch.no_grad()
def test_torch_export(tower, bee, texts, pixels):
    exported = torch.export.export(tower, (pixels,), strict=False).module()
    torch.testing.assert_close(exported(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    arguments = {**texts[0], "use_cache": False}
    exported = torch.export.export(bee, (), arguments, dynamic_shapes=SHAPES, strict=False).module()
    for text in texts:
        torch.testing.assert_close(exported(**text, use_cache=False).logits, bee(**text, use_cache=False).logits)


@torch.no_grad()
def test_onnx(tower, bee, texts, pixels, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

    def session(name: str, *arguments, **options):
        torch.onnx.export(*arguments, dynamo=True, verbose=False, **options).save(tmp_path / name)
        return onnxruntime.InferenceSession(tmp_path / name)

    (hidden,) = session("tower.onnx", tower, (pixels,)).run(None, {"pixel_values": pixels.numpy()})
    torch.testing.assert_close(torch.tensor(hidden), tower(pixels).last_hidden_state, atol=1e-4, rtol=1e-4)
    prefill = session("bee.onnx", bee, (), kwargs={**texts[0], "use_cache": False}, dynamic_shapes=SHAPES)
    for text in texts:
        (logits,) = prefill.run(None, {name: tensor.numpy() for name, tensor in text.items()})
        torch.testing.assert_close(torch.tensor(logits), bee(**text).logits, atol=1e-4, rtol=1e-4)
