"""VisCPM-Paint's text encoder: parity with the reference, padding, loading and saving."""

import json
import shutil

import pytest
import torch
from paint_support import CASES, PAINT, components, expected
from support import GOLDEN
from transformers import AutoConfig, AutoModel

from viscpm_hf import CpmBeeTokenizer, OriginalCheckpointError, VisCPMPaintTextEncoder, VisCPMPaintTextEncoderConfig
from viscpm_hf.modeling.compatibility import CHECKPOINTING


SIDES = ("cond", "uncond")


@pytest.fixture(scope="module")
def golden():
    return expected()


@pytest.fixture(scope="module")
def tokenizer():
    return CpmBeeTokenizer(str(PAINT / "vocab.txt"))


@pytest.fixture(scope="module")
def original_folder(tmp_path_factory):
    """The text encoder's folder as the original's repository may have it: configuration and file together."""
    folder = tmp_path_factory.mktemp("original") / "text_encoder"
    folder.mkdir()
    llm = json.loads((PAINT / "cpm-bee.json").read_text("utf-8"))
    config = {"model_type": "cpmbee", **llm, "unet_cross_attention_dim": 24}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    shutil.copy(PAINT / "pytorch_model.bin", folder)
    return folder


@pytest.fixture(scope="module")
def encoder(original_folder):
    return VisCPMPaintTextEncoder.from_pretrained(original_folder).eval()


def encode(tokenizer, *texts, **kwargs):
    documents = [tokenizer.encode_document({"caption": tokenizer.escape(text), "objects": ""}) for text in texts]
    inputs = tokenizer.collate(documents, padding_side="right", return_tensors="pt", **kwargs)
    return inputs


def pair(case: int) -> tuple[str, str]:
    return CASES[case]["prompt"], CASES[case]["negative_prompt"] or ""


@pytest.mark.parametrize("case", range(len(CASES)))
def test_token_tensors_are_the_references(tokenizer, golden, case):
    inputs = encode(tokenizer, *pair(case))
    for row, side in enumerate(SIDES):
        reference = {name: golden[f"{case}.{side}.{name}"][0] for name in ("input_ids", "input_id_subs", "context")}
        ids = inputs["input_ids"][row]
        table = inputs["extension_table"][row]
        extension = (ids - tokenizer.num_words).clamp(min=0)
        is_extension = ids >= tokenizer.num_words
        base = torch.where(is_extension, table[extension, 0], ids) if len(table) else ids
        sub = torch.where(is_extension, table[extension, 1], 0) if len(table) else torch.zeros_like(ids)
        length = int(golden[f"{case}.{side}.length"])
        assert inputs["attention_mask"][row].sum() == length
        assert torch.equal(base, reference["input_ids"].long())
        assert torch.equal(sub, reference["input_id_subs"].long())
        # What is context there is neither padding nor answer here.
        assert torch.equal(inputs["attention_mask"][row], reference["context"].long())
        assert torch.equal(inputs["segment_ids"][row], golden[f"{case}.{side}.segment_ids"][0].long())
        relations = inputs["segment_relations"][row].flatten()
        assert torch.equal(relations, golden[f"{case}.{side}.segment_rel"][0, : len(relations)].long())


@pytest.mark.parametrize("case", range(len(CASES)))
def test_hidden_states_and_embeddings_are_the_references(encoder, tokenizer, golden, case):
    with torch.no_grad():
        outputs = encoder(**encode(tokenizer, *pair(case)))
    for row, side in enumerate(SIDES):
        hidden_states = golden[f"{case}.{side}.hidden_states"][0]
        torch.testing.assert_close(outputs.last_hidden_state[row], hidden_states, rtol=0, atol=1e-4)
        prompt_embeds = golden[f"{case}.{side}.prompt_embeds"][0]
        torch.testing.assert_close(outputs.prompt_embeds[row], prompt_embeds, rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_is_one_vector_and_changes_nothing(encoder, tokenizer, implementation):
    encoder.set_attn_implementation(implementation)
    with torch.no_grad():
        alone = encoder(**encode(tokenizer, "蓝色")).prompt_embeds[0]
        padded = encoder(**encode(tokenizer, "蓝色", "a red circle", min_length=40)).prompt_embeds[0]
    torch.testing.assert_close(padded[: len(alone)], alone, rtol=0, atol=1e-5)
    padding = padded[len(alone) :]
    assert len(padding) > 10
    torch.testing.assert_close(padding, padding[:1].expand_as(padding), rtol=0, atol=1e-6)


def test_saved_is_loaded(encoder, tokenizer, tmp_path):
    encoder.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), VisCPMPaintTextEncoderConfig)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, VisCPMPaintTextEncoder)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_layers_are_recorded_and_no_cache_is_kept(encoder, tokenizer):
    outputs = encoder(**encode(tokenizer, "蓝色"), output_hidden_states=True)
    assert len(outputs.hidden_states) == encoder.config.num_hidden_layers + 1
    assert "past_key_values" not in outputs
    assert isinstance(encoder(**encode(tokenizer, "蓝色"), return_dict=False), tuple)


def test_projection_is_a_plain_product(encoder, tokenizer):
    """The original divides CPM-Bee's products by √width, but not this one."""
    original = torch.load(PAINT / "pytorch_model.bin", weights_only=True)
    assert torch.equal(encoder.projection.weight, original["trans_block.w_out_res.weight"])
    folded = original["llm.encoder.layers.0.ffn.ffn.w_out.weight"]
    torch.testing.assert_close(encoder.model.layers[0].mlp.down_proj.weight, folded / folded.shape[1] ** 0.5)


def test_a_chat_checkpoint_is_refused_by_name(original_folder, tmp_path):
    shutil.copytree(original_folder, tmp_path, dirs_exist_ok=True)
    shutil.copy(GOLDEN / "chat_a" / "pytorch_model.bin", tmp_path)
    with pytest.raises(OriginalCheckpointError, match="VisCPM-Chat checkpoint .* can't paint"):
        VisCPMPaintTextEncoder.from_pretrained(tmp_path)


def test_gradients_reach_the_first_layer(tokenizer):
    encoder = components()["text_encoder"].train()
    getattr(encoder, f"{CHECKPOINTING}_enable")()
    encoder(**encode(tokenizer, "蓝色", "red")).prompt_embeds.square().mean().backward()
    assert encoder.model.embed_tokens.weight.grad.abs().sum() > 0
