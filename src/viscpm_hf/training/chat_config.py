"""What can be set when Chat is fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .options import PRECISIONS, TrainingOptions, option


MODES = ("lora", "qlora", "full")

# Pictures below this are skipped, as the reference did, unless the model's own are smaller.
REFERENCE_MIN_IMAGE_SIDE = 128


@dataclass
class ChatTrainingConfig(TrainingOptions):
    """Options of [`train_chat`] and, by the same names, of `viscpm-hf train chat` and its YAML file.

    Raises:
        ValueError: for values of the wrong type or outside their range, and for options that exclude each other.
    """

    adapter_learning_rate: ClassVar[float] = 2e-4

    output: str = option(None, "folder of the trained model or adapter; checkpoints in it / 输出文件夹", metavar="OUT")
    model: str | None = option(None, "file, folder, Hub id or viscpm-tiny / 模型", metavar="MODEL")
    data: list[str] = option(
        [], "JSON, JSONL, parquet, Hub id, with a weight as data.json:2; repeatable / 训练数据，可重复", metavar="DATA"
    )
    eval_data: list[str] = option([], "held-out data, likewise / 验证数据", metavar="DATA")
    llm_config: str | None = option(None, "original file: the language model's configuration / 语言模型配置")
    vision_config: str | None = option(None, "original file: the vision tower's sizes / 视觉编码器配置")
    vocab: str | None = option(None, "vocab.txt, if not beside the model / 词表")

    mode: str = option("lora", "an adapter (default), one on a 4-bit model, or all weights / 训练方式", choices=MODES)
    lora_alpha: int = option(32, "its scale is alpha / rank (32) / LoRA 缩放")
    lora_dropout: float = option(0.05, "(0.05) / LoRA dropout")
    lora_targets: list[str] = option(
        [],
        "layers that get one (all of the language model); one with `.` or `*` is a regular expression / LoRA 目标层",
    )
    freeze_vision: bool = option(False, "train no image expert of the vision tower / 冻结视觉专家")
    freeze_llm: bool = option(False, "train no weight of the language model / 冻结语言模型")
    train_patches: bool = option(False, "train the patch embedding too, for models from nothing / 训练图块嵌入")

    learning_rate: float | None = option(None, "at its peak (1e-5, adapters 2e-4) / 学习率")
    batch_size: int = option(1, "samples a step and device (1) / 每设备批大小")
    optimizer: str = option("adamw_torch", "transformers' name (adamw_torch), or muon / 优化器")
    adam_beta2: float = option(0.98, "(0.98) / Adam 的 beta2")
    weights: str | None = option(
        None, "of the base weights (full: fp32; adapters: as precision) / 权重精度", choices=PRECISIONS
    )
    seed: int = option(42, "of order, augmentation, dropout, adapter / 随机种子")

    max_length: int = option(512, "tokens of a sample; longer ones are skipped (512) / 样本最大长度")
    group_by_length: bool = option(True, "batches of samples of like length / 按长度分组")
    image_size: int | None = option(None, "side in pixels; positions are interpolated (the model's) / 图像边长")
    min_image_side: int | None = option(None, "smaller pictures are skipped (128, or the model's) / 图片最小边长")
    augment: bool = option(False, "random crop, flip and RandAugment as in the original / 数据增强")
    workers: int | None = option(None, "processes that prepare data (2 with a GPU, else 0) / 数据进程数")

    def __post_init__(self):
        self._check()
        self._check_at_least("max_length", 1)
        self._check_at_least("min_image_side", 0)
        self._check_shares("lora_dropout", "adam_beta2")
        if self.freeze_llm and self.mode != "full" and not self.lora_targets:
            raise ValueError(
                f"freeze_llm leaves {self.mode} nothing to train: its adapters sit in the language model. Use mode "
                '"full", or name other layers with lora_targets.'
            )
        if self.weights == "fp16" and self.mode == "full":
            raise ValueError("Full fine-tuning needs weights in fp32 or bf16: fp16 ones lose small gradients.")
