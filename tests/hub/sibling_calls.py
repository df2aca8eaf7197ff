"""The calls of the siblings' cards and of the pruned CPM-Bee's; run as a program, as `calls.py` is.

python sibling_calls.py PLACE TRUST IMAGE
"""

import json
import os
import sys

import PIL.Image
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import viscpm_hf


place, trust, image_file = sys.argv[1:]
options = {"trust_remote_code": True} if trust == "trust" else {}
image = PIL.Image.open(image_file).convert("RGB")
found = {}


def at(name: str) -> str:
    return name if place == "hub" else os.path.join(place, name)


chat = viscpm_hf.OmniLMMChat(at("openbmb/OmniLMM-12B"), device="cpu", dtype=torch.float32)
found["queries"] = chat.sibling.model.config.num_query_tokens
for message in (
    {"role": "user", "content": "What?"},
    {"from": "human", "value": "What?"},
    {"role": "human", "content": "What?"},
):
    torch.manual_seed(0)
    question = json.dumps([message])
    found.setdefault("omnilmm", []).append(
        chat.chat({"image": viscpm_hf.img2base64(image_file), "question": question})
    )

for name in ("openbmb/MiniCPM-V", "openbmb/MiniCPM-V-2"):
    model = AutoModel.from_pretrained(at(name), torch_dtype=torch.bfloat16, **options).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(at(name), **options)
    ways = [{"msgs": [{"role": "user", "content": "What?"}]}]
    ways += [{"question": "What?"}] if name == "openbmb/MiniCPM-V" else []
    for way in ways:
        answer, context, _ = model.chat(image=image, context=None, tokenizer=tokenizer, sampling=False, num_beams=1,
                                        max_new_tokens=6, **way)  # fmt: skip
        assert context[-1] == {"role": "assistant", "content": answer}
        found.setdefault(name, []).append(answer)

from viscpm_hf.siblings import visualcla  # noqa: E402


parts = {"text_model": "chinese-alpaca-plus-7b", "vision_model": "clip-vit-large-patch14",
         "lora_model": "visualcla-7b-v0.1"}  # fmt: skip
parts = {part: at(f"ziqingyang/{name}") for part, name in parts.items()}
base_model, tokenizer, _ = visualcla.get_model_and_tokenizer_and_processor(
    **parts, torch_dtype=torch.float32, default_device="cpu"
)
greedy = {"do_sample": False, "max_new_tokens": 6}
found["visualcla"] = [visualcla.chat(base_model, image_file, "What?", generation_config=greedy)[0]]
base_model.resize_token_embeddings(len(tokenizer))
model = PeftModel.from_pretrained(base_model, parts["lora_model"])
found["visualcla"].append(visualcla.chat(model, image_file, "What?", generation_config=greedy)[0])
with model.disable_adapter():
    found["visualcla bare"] = visualcla.chat(model, image_file, "What?", generation_config=greedy)[0]

for size in ("1b", "2b", "5b"):
    name = at(f"openbmb/cpm-bee-{size}")
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    for auto_class in (AutoModel, AutoModelForCausalLM):
        model = auto_class.from_pretrained(name, **options).float()
        answer = model.generate({"input": "红色", "<ans>": ""}, tokenizer, max_new_tokens=6)[0]["<ans>"]
        found.setdefault(size, []).append(answer)
    encoded = tokenizer.prepare_for_finetune([{"input": "红色", "<ans>": "绿"}], max_length=64)
    loss = model(**encoded).loss.item()
    blocks = [sum(parts) for parts in zip(*model.config.mask_modules, strict=True)]
    found[size] += [blocks, loss == loss]
print(json.dumps(found))
