"""The calls of the model cards, as they are written there; run as a program, since the Hub's address is read once.

python calls.py PLACE TRUST IMAGE       # PLACE: a folder of the repositories, or "hub"
"""

import json
import os
import sys

import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

import viscpm_hf


place, trust, image_file = sys.argv[1:]
options = {"trust_remote_code": True} if trust == "trust" else {}


def at(name: str) -> str:
    return name if place == "hub" else os.path.join(place, name)


found = {}

# VisCPM-Chat
name = at("openbmb/VisCPM-Chat")
tokenizer = AutoTokenizer.from_pretrained(name, **options)
processor = AutoImageProcessor.from_pretrained(name, **options)
model = AutoModel.from_pretrained(name, **options)
import PIL.Image  # noqa: E402


image = PIL.Image.open(image_file).convert("RGB")
data = [{"context": "", "question": "颜色", "image": tokenizer.unk_token * model.query_num, "<ans>": ""}]
found["chat"] = model.generate(data, tokenizer, processor, image, max_new_tokens=8)[0]["<ans>"]
found["chat classes"] = [type(part).__name__ for part in (tokenizer, processor, model)]
found["processor"] = type(AutoProcessor.from_pretrained(name, **options)).__name__
other = AutoModel.from_pretrained(name, variant="zhplus", **options)
found["variants differ"] = not torch.equal(
    model.model.multi_modal_projector.linear_2.weight, other.model.multi_modal_projector.linear_2.weight
)

# VisCPM-Paint
name = at("openbmb/VisCPM-Paint")
text_encoder = AutoModel.from_pretrained(name, **options)
tokenizer = AutoTokenizer.from_pretrained(name, **options)
found["paint classes"] = [type(part).__name__ for part in (text_encoder, tokenizer)]
pipelines = [
    DiffusionPipeline.from_pretrained(name, custom_pipeline=name, text_encoder=text_encoder, tokenizer=tokenizer),
    DiffusionPipeline.from_pretrained(name, dtype=torch.float32, device_map="cpu", **options),
    AutoPipelineForText2Image.from_pretrained(name),
    DiffusionPipeline.from_pretrained(name, variant="balance"),
]
found["pipelines"] = [type(pipe).__name__ for pipe in pipelines]
images = []
for pipe in pipelines:
    pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipe(prompt="circle", negative_prompt="", width=16, height=16, guidance_scale=3.0, num_inference_steps=2,
                 generator=generator, num_images_per_prompt=1, output_type="np").images  # fmt: skip
    images.append(torch.from_numpy(drawn))
found["pictures agree"] = all(torch.equal(images[0], other) for other in images)
found["steps_offset"] = pipelines[1].scheduler.config.steps_offset

# CPM-Bee
answers = []
for name in map(at, ("openbmb/cpm-bee-10b", "someone/cpm-bee-10b-shards")):
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    for auto_class in (AutoModel, AutoModelForCausalLM):
        model = auto_class.from_pretrained(name, **options)
        assert type(model).__name__ == "CpmBeeForCausalLM", type(model)
        answers.append(model.generate({"input": "红色", "<ans>": ""}, tokenizer, max_new_tokens=6)[0]["<ans>"])
    assert model.generation_config.num_beams == 3
found["cpm-bee"] = answers

name_of_chat = at("openbmb/VisCPM-Chat")
chat = viscpm_hf.VisCPMChat(name_of_chat, device="cpu")
if place == "hub":
    halved = viscpm_hf.VisCPMChat(f"{name_of_chat}:v1.1", device="cpu").model.model.multi_modal_projector.linear_2
    found["release"] = torch.equal(2 * halved.weight, chat.model.model.multi_modal_projector.linear_2.weight)
found["VisCPMChat"] = chat.chat(image_file, "颜色", max_new_tokens=8)[0]
print(json.dumps(found))
