"""Other people's models, with viscpm_hf imported (`with`) or not; run as a program."""

import json
import sys


if sys.argv[1] == "with":
    import viscpm_hf  # noqa: F401

import diffusers
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer


AutoTokenizer.from_pretrained("stock/bert")
bert = AutoModel.from_pretrained("stock/bert")
llava = AutoConfig.from_pretrained("stock/llava")
AutoProcessor.from_pretrained("stock/llava")
AutoImageProcessor.from_pretrained("stock/llava")
pipe = DiffusionPipeline.from_pretrained("stock/ddpm")
autos = (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer)
owners = {cls.from_pretrained.__func__.__code__.co_filename.partition("site-packages")[2] for cls in autos}
owners.add(AutoPipelineForText2Image.from_pretrained.__func__.__code__.co_filename.partition("site-packages")[2])
kinds = [type(part).__name__ for part in (bert, llava, pipe)]
print(json.dumps({"kinds": kinds, "owners": sorted(owner.split("/")[1] for owner in owners), "ours": [
    name for name in dir(diffusers.DiffusionPipeline) if "viscpm" in name.lower()]}))  # fmt: skip
