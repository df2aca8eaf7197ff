"""What can be set when Paint is fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .options import TrainingOptions, option


MODES = ("full", "lora")

# The UNet's attention, self and cross; diffusers' own choice for Stable Diffusion.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass
class PaintTrainingConfig(TrainingOptions):
    """Options of [`train_paint`] and, by the same names, of `viscpm-hf train paint` and its YAML file.

    Raises:
        ValueError: for values of the wrong type or outside their range, and for options that exclude each other.
    """

    adapter_learning_rate: ClassVar[float] = 1e-4

    output: str = option(
        None, "folder of the trained pipeline or adapter; checkpoints in it / 输出文件夹", metavar="OUT"
    )
    model: str | None = option(None, "converted folder, Hub id or viscpm-tiny / 模型", metavar="MODEL")
    data: list[str] = option(
        [],
        "captions: JSON, JSONL, folder with metadata.jsonl, parquet, Hub id; repeatable / 图文数据，可重复",
        metavar="DATA",
    )
    eval_data: list[str] = option([], "held-out captions, likewise / 验证数据", metavar="DATA")
    cache: str | None = option(None, "encoded prompts and pictures (OUT/cache) / 编码缓存文件夹", metavar="DIR")

    mode: str = option("full", "the whole UNet (default), or an adapter on it / 训练方式", choices=MODES)
    freeze_unet: bool = option(False, "train the projection alone / 冻结 UNet，仅训练投影层")
    train_projection: bool = option(False, "train the text encoder's projection too / 同时训练文本投影层")
    lora_alpha: int = option(16, "its scale is alpha / rank (16) / LoRA 缩放")
    lora_targets: list[str] = option([], f"layers that get one ({', '.join(LORA_TARGETS)}) / LoRA 目标层")

    image_size: int | None = option(None, "side of the pictures in pixels (the model's) / 图像边长")
    prompt_dropout: float = option(
        0.1, "share of prompts replaced by the empty one, for guidance (0.1) / 提示词丢弃率"
    )
    snr_gamma: float = option(5.0, "min-SNR weighting; 0 weights all steps alike (5) / min-SNR 权重")
    noise_offset: float = option(0.0, "lets pictures become very dark or bright, 0.05 or so (0) / 噪声偏移")
    ema_decay: float = option(0.0, "averages the weights, 0.9999 or so; 0 does not (0) / 权重滑动平均")

    learning_rate: float | None = option(None, "at its peak (1e-5, adapters 1e-4) / 学习率")
    batch_size: int = option(1, "pictures a step and device (1) / 每设备批大小")
    optimizer: str = option("adamw_torch", "transformers' name (adamw_torch) / 优化器")
    adam_beta2: float = option(0.999, "(0.999) / Adam 的 beta2")
    encode_batch_size: int = option(8, "prompts or pictures encoded at once (8) / 编码批大小")
    seed: int = option(42, "of order, noise, adapter / 随机种子")

    workers: int = option(0, "processes that read the cache (0) / 数据进程数")

    validation_prompts: list[str] = option(
        [], "drawn during training; repeatable / 训练中绘制的提示词", metavar="TEXT"
    )
    validation_steps: int | None = option(None, "between these drawings (as save-steps) / 绘制间隔")
    inference_steps: int = option(50, "denoising steps of these drawings (50) / 绘制采样步数")
    guidance: float = option(7.5, "weight of the prompt in these drawings (7.5) / 绘制引导系数")

    def __post_init__(self):
        self._check()
        for name in ("encode_batch_size", "inference_steps", "validation_steps"):
            self._check_at_least(name, 1)
        self._check_at_least("snr_gamma", 0)
        self._check_shares("prompt_dropout", "ema_decay", "adam_beta2")
        if self.freeze_unet and not self.train_projection:
            raise ValueError("freeze_unet leaves nothing to train; with train_projection the projection is.")
        if self.freeze_unet and self.mode == "lora":
            raise ValueError("mode lora adapts the UNet, which freeze_unet forbids: choose one of the two.")
