"""What the demo page says, in Chinese and English."""

from __future__ import annotations


LANGUAGES = {"zh": "中文", "en": "English"}

# Chinese, English.
TEXTS: dict[str, tuple[str, str]] = {
    "intro": (
        "## VisCPM\n就图片提问，或者根据文字画图。",
        "## VisCPM\nAsk about pictures, or paint pictures from words.",
    ),
    "tiny": (
        "内置的小模型 viscpm-tiny 只认识图形：圆形、正方形、三角形和五角星，共十种颜色。",
        "The embedded model, viscpm-tiny, knows nothing but shapes: circles, squares, triangles and stars in ten "
        "colours.",
    ),
    "language": ("语言 / Language", "Language / 语言"),
    "chat": ("对话", "Chat"),
    "paint": ("绘画", "Paint"),
    "settings": ("设置", "Settings"),
    # chat
    "picture": ("图片", "Picture"),
    "picture_hint": ("把图片拖到这里，或点击上传", "Drop a picture here, or click to choose one"),
    "samples": ("示例图片", "Sample pictures"),
    "conversation": ("对话", "Conversation"),
    "conversation_hint": ("选一张图片，然后提问。", "Choose a picture, then ask about it."),
    "question": ("问题", "Question"),
    "question_hint": ("图里有什么？（回车发送）", "What is in the picture? (Enter sends)"),
    "send": ("发送", "Send"),
    "stop": ("停止", "Stop"),
    "retry": ("重答", "Retry"),
    "clear": ("清空", "Clear"),
    "decoding": ("解码方式", "Decoding"),
    "sampling": ("采样（逐字显示）", "Sampling (as it is written)"),
    "reference": ("原版（束搜索，写完才显示）", "The original's (beam search, shown when done)"),
    "max_tokens": ("最大长度（token）", "Longest answer (tokens)"),
    "temperature": ("温度（0：总取最可能的词）", "Temperature (0: always the likeliest word)"),
    "top_p": ("top-p", "Top-p"),
    "answering": ("正在回答……", "Answering ..."),
    "answered": (
        "{tokens} 个 token，{seconds:.1f} 秒，每秒 {speed:.1f} 个 token",
        "{tokens} tokens in {seconds:.1f} s, {speed:.1f} tokens per second",
    ),
    "empty": ("模型没有回答。", "The model says nothing."),
    "cut": ("已达到最大长度", "ended at the greatest length"),
    "stopped": ("已停止。", "Stopped."),
    "new_conversation": ("图片换了：新的对话开始。", "Another picture: a new conversation begins."),
    "cleared": ("对话已清空。", "The conversation is cleared."),
    "no_picture": (
        "还没有图片，所以回答只依据文字；请先选一张图片，再就它提问。",
        "There is no picture yet, so the answer goes by your words alone: choose a picture to ask about it.",
    ),
    "no_question": ("请先输入问题。", "Please type a question first."),
    "nothing_to_retry": ("还没有可以重答的问题。", "There is no question to answer again yet."),
    # paint
    "prompt": ("提示词", "Prompt"),
    "prompt_hint": ("右边有一个蓝色的五角星（回车开始画）", "a red circle on the left (Enter paints)"),
    "negative": ("反向提示词（不要画什么）", "Negative prompt (what not to paint)"),
    "draw": ("画图", "Paint"),
    "preset": ("预设", "Preset"),
    "preset_reference": ("原版（DDPM，50 步）", "Reference (DDPM, 50 steps)"),
    "preset_quality": ("优质（25 步）", "Quality (25 steps)"),
    "preset_fast": ("快速（12 步）", "Fast (12 steps)"),
    "steps": ("去噪步数", "Denoising steps"),
    "guidance": ("引导系数", "Guidance"),
    "size": ("边长（像素）", "Size (pixels a side)"),
    "candidates": ("候选图数量", "Number of candidates"),
    "random_seed": ("随机种子", "Random seed"),
    "seed": ("种子（固定时使用）", "Seed (if not random)"),
    "gallery": ("图片", "Pictures"),
    "downloads": ("下载（PNG 内含全部设置）", "Download (all settings are inside the PNG)"),
    "denoising": ("去噪", "denoising"),
    "candidate_seed": ("种子 {seed}", "seed {seed}"),
    "candidate_score": ("得分 {score:.2f}", "score {score:.2f}"),
    "painted": ("{images} 张图片，{seconds:.1f} 秒", "Pictures: {images}, in {seconds:.1f} s"),
    "withheld": (
        "种子 {seed} 的图片未通过安全检查，不予显示（{reason}）。",
        "The picture of seed {seed} did not pass the safety check and is not shown ({reason}).",
    ),
    # errors
    "busy": ("现在请求太多，请稍后再试。", "Too many requests at the moment: please try again a little later."),
    "unsafe_prompt": (
        "安全检查未通过这个提示词，没有画图。",
        "The prompt did not pass the safety check, so nothing was painted.",
    ),
    "unsafe_picture": (
        "安全检查未通过这张图片，无法回答。",
        "The picture did not pass the safety check, so nothing is answered about it.",
    ),
    "closed": ("服务正在关闭，请稍后再试。", "The server is shutting down: please try again later."),
    "bad_picture": ("这张图片无法使用：{detail}", "{detail}"),
    "no_memory": (
        "内存不足，请换小一些的尺寸或长度再试：{detail}",
        "There is not enough memory for this, try a smaller size or length: {detail}",
    ),
    "bad_value": ("输入或设置有误：{detail}", "{detail}"),
    "failed": ("出错了：{detail}", "{detail}"),
    "empty_prompt": ("请先写下要画什么。", "Please say first what to paint."),
}


def say(language: str, key: str, **values) -> str:
    """A text in the language `"zh"` or `"en"`."""
    chinese, english = TEXTS[key]
    text = chinese if language == "zh" else english
    return text.format(**values) if values else text


def preferred_language(accept_language: str) -> str:
    """The page's language for a browser's `Accept-Language`: of those that the page has, the first it names."""
    for entry in accept_language.lower().split(","):
        name = entry.strip()[:2]
        if name in LANGUAGES:
            return name
    return "en"
