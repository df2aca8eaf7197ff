"""What can be set when Chat is fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .options import BAD_ROWS, PRECISIONS, TrainingOptions, option


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
    images: str | None = option(None, "where the data's pictures lie (beside the data) / 图片文件夹", metavar="DIR")
    llm_config: str | None = option(None, "original file: the language model's configuration / 语言模型配置")
    vision_config: str | None = option(None, "original file: the vision tower's sizes / 视觉编码器配置")
    vocab: str | None = option(None, "vocab.txt, if not beside the model / 词表")

    mode: str = option("lora", "adapter, adapter on a 4-bit model, or all weights / 训练方式", choices=MODES)
    lora_rank: int = option(16, "rank of the adapter (16) / LoRA 秩")
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
    epochs: float = option(5.0, "passes over the data (5) / 训练轮数")
    max_steps: int | None = option(None, "stop after so many steps instead / 最大步数")
    batch_size: int = option(1, "samples a step and device (1) / 每设备批大小")
    eval_batch_size: int | None = option(None, "(as batch-size) / 验证批大小")
    accumulation: int = option(1, "steps whose gradients are summed (1) / 梯度累积")
    warmup: float = option(0.03, "steps, or below 1 their share (0.03) / 预热步数或比例")
    scheduler: str = option("cosine", "of the learning rate, transformers' names (cosine) / 学习率调度")
    optimizer: str = option("adamw_torch", "transformers' name (adamw_torch), or muon / 优化器")
    weight_decay: float = option(0.01, "(0.01) / 权重衰减")
    adam_beta2: float = option(0.98, "(0.98) / Adam 的 beta2")
    max_grad_norm: float = option(1.0, "clips gradients; 0 does not (1) / 梯度裁剪")
    precision: str | None = option(
        None, "of the computation (bf16 on a GPU, else fp32) / 计算精度", choices=PRECISIONS
    )
    weights: str | None = option(
        None, "of the base weights (full: fp32; adapters: as precision) / 权重精度", choices=PRECISIONS
    )
    gradient_checkpointing: bool = option(False, "saves memory, costs a third more time / 梯度检查点")
    seed: int = option(42, "of order, augmentation, dropout, adapter / 随机种子")

    max_length: int = option(512, "tokens of a sample; longer ones are skipped (512) / 样本最大长度")
    group_by_length: bool = option(True, "batches of samples of like length / 按长度分组")
    image_size: int | None = option(None, "side in pixels; positions are interpolated (the model's) / 图像边长")
    min_image_side: int | None = option(None, "smaller pictures are skipped (128, or the model's) / 图片最小边长")
    augment: bool = option(False, "random crop, flip and RandAugment as in the original / 数据增强")
    bad_rows: str = option("skip", "rows that can't be used: report and skip, or fail / 坏数据处理", choices=BAD_ROWS)
    workers: int | None = option(None, "processes that prepare data (2 with a GPU, else 0) / 数据进程数")

    save_steps: int | None = option(None, "between checkpoints (an epoch) / 保存间隔")
    eval_steps: int | None = option(None, "between evaluations (as save-steps) / 验证间隔")
    log_steps: int = option(10, "between reports of the loss (10) / 日志间隔")
    save_total_limit: int = option(2, "checkpoints kept, the best one included (2) / 保留检查点数")
    keep_best: bool = option(True, "with eval-data: the best checkpoint is the result / 保留最佳检查点")
    resume: bool = option(False, "go on from OUT's last checkpoint, if there is one / 断点续训")
    tensorboard: bool = option(True, "write OUT/checkpoints/runs / TensorBoard 日志")

    def __post_init__(self):
        self._check()
        for name in ("lora_rank", "lora_alpha", "epochs", "batch_size", "accumulation", "max_length", "log_steps"):
            self._check_at_least(name, 1 if isinstance(getattr(self, name), int) else 1e-9)
        for name in ("max_steps", "eval_batch_size", "save_steps", "eval_steps", "save_total_limit", "image_size"):
            self._check_at_least(name, 1)
        for name in ("learning_rate", "warmup", "weight_decay", "max_grad_norm", "workers", "min_image_side", "seed"):
            self._check_at_least(name, 0)
        self._check_shares("lora_dropout", "adam_beta2")
        if self.freeze_llm and self.mode != "full" and not self.lora_targets:
            raise ValueError(
                f"freeze_llm leaves {self.mode} nothing to train: its adapters sit in the language model. Use mode "
                '"full", or name other layers with lora_targets.'
            )
        if self.weights == "fp16" and self.mode == "full":
            raise ValueError("Full fine-tuning needs weights in fp32 or bf16: fp16 ones lose small gradients.")
