"""Model cards of converted checkpoints, in English and Chinese."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .plan import Checkpoint


BASE_MODELS = {"chat": "openbmb/VisCPM-Chat", "paint": "openbmb/VisCPM-Paint", "cpm_bee": "openbmb/cpm-bee-10b"}
LICENCE = "research use, commercial use on request to their authors"
LICENCE_ZH = "可用于研究，商用须向原作者申请"
# What was done to the weights.
RENAMED = ("under new names", "只是改用了新的名称")
MERGED = ("merged with the models that they change", "已与其基座模型合并")

FRONT_MATTER = """\
---
language:
- zh
- en
license: other
license_name: see-base-model
license_link: https://huggingface.co/{base_model}
library_name: {library}
pipeline_tag: {pipeline_tag}
base_model: {base_model}
tags:
- {tag}
- safetensors
---
"""

CHAT_USE = """\
```python
import viscpm_hf  # if it is installed; else leave it out and add trust_remote_code=True to both calls below
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("PATH", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("PATH")

content = [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "图片里有什么？"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""

CPM_BEE_USE = """\
```python
import viscpm_hf  # if it is installed; else leave it out and add trust_remote_code=True to both calls below
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto"), AutoTokenizer.from_pretrained("PATH")
print(model.fill([{"input": "今天天气真好", "<ans>": ""}], tokenizer))
```
"""

PAINT_USE = """\
```python
import viscpm_hf  # if it is installed; else leave it out and add trust_remote_code=True to the call below
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH", dtype=torch.float16).to("cuda")
pipeline("人闲桂花落，月静春山空").images[0].save("out.png")
```
"""

BODY = """\
# {title}

{english}

## Use / 使用

{use}
## Weights / 权重

These are the weights of [{base_model}](https://huggingface.co/{base_model}), {parameters:.2f} billion parameters in
{dtypes}, {changed}; nothing was trained. **They remain under the licence of the original weights: {licence}.** The
Python files are Apache-2.0.

这些是 [{base_model}](https://huggingface.co/{base_model}) 的权重，{parameters:.2f} B 参数，{dtypes}，
{changed_zh}，没有重新训练。**权重仍受原始许可证约束：{licence_zh}。**
其中的 Python 文件采用 Apache-2.0 许可证。

| | |
|---|---|
| source file / 源文件 | `{source}` |
| SHA-256 | `{sha256}` |
| converted by / 转换工具 | {tool} |
| command / 转换命令 | `{command}` |
| rounding / 精度 | {rounding} |

`conversion.json` lists every tensor with its old name and what was done to it. /
`conversion.json` 逐一列出每个张量的原名与所做的处理。
"""

PAPER = """
## Paper / 论文

[Large Multilingual Models Pivot Zero-Shot Multimodal Learning across
Languages](https://arxiv.org/abs/2308.12038) (ICLR 2024)
"""


_TEXTS: dict[str, dict[str, str]] = {
    "chat": {
        "library": "transformers",
        "pipeline_tag": "image-text-to-text",
        "title": "VisCPM-Chat",
        "english": "Answers questions about images, in Chinese and English: BEiT-3 as the eye, CPM-Bee as the "
        "language model.\n\n中英双语的图像问答模型：BEiT-3 作为视觉编码器，CPM-Bee 作为语言模型。",
        "use": CHAT_USE,
    },
    "cpm_bee": {
        "library": "transformers",
        "pipeline_tag": "text-generation",
        "title": "CPM-Bee",
        "english": "A language model that fills the blanks of documents, in Chinese and English.\n\n"
        "中英双语语言模型，填写文档中的空缺。",
        "use": CPM_BEE_USE,
    },
    "paint": {
        "library": "diffusers",
        "pipeline_tag": "text-to-image",
        "title": "VisCPM-Paint",
        "english": "Text to image, from Chinese and English prompts: CPM-Bee as the text encoder of a Stable "
        "Diffusion 2.1 UNet.\n\n中英双语文生图模型：CPM-Bee 作为 Stable Diffusion 2.1 UNet 的文本编码器。",
        "use": PAINT_USE,
    },
}


def _texts(checkpoint: Checkpoint) -> dict[str, str]:
    if checkpoint.kind in _TEXTS:
        common = {"tag": "viscpm", "base_model": BASE_MODELS[checkpoint.kind], "paper": PAPER}
        return {**_TEXTS[checkpoint.kind], **common, "licence": LICENCE, "licence_zh": LICENCE_ZH}
    from ..families.systems import system_of

    system = system_of(checkpoint.config)
    return {
        **{name: _TEXTS["chat"][name] for name in ("library", "pipeline_tag", "use")},
        "title": system.name,
        "english": f"{system.english}\n\n{system.chinese}",
        "tag": checkpoint.kind,
        "base_model": system.base_model,
        "paper": "",
        "licence": system.licence,
        "licence_zh": system.licence_zh,
    }


def card(checkpoint: Checkpoint, num_parameters: int, manifest: Mapping[str, Any]) -> str:
    """The card of a converted checkpoint of any kind."""
    texts = _texts(checkpoint)
    changed, changed_zh = MERGED if checkpoint.made_by else RENAMED
    body = BODY.format(
        **texts,
        parameters=num_parameters / 1e9,
        dtypes=" + ".join(sorted({entry["dtype"] for entry in manifest["tensors"]})),
        source=manifest["source"]["file"],
        sha256=manifest["source"]["sha256"],
        **{name: manifest[name] for name in ("tool", "command", "rounding")},
        changed=changed,
        changed_zh=changed_zh,
    )
    return FRONT_MATTER.format(**texts) + "\n" + body + texts["paper"]
