"""What the demo page says, in Chinese and English."""

from __future__ import annotations


LANGUAGES = {"zh": "中文", "en": "English"}

# Chinese, English.
TEXTS: dict[str, tuple[str, str]] = {
    "intro": ("就图片提问，或者根据文字画图。", "Ask about pictures, or paint pictures from words."),
    "tiny": (
        "就图片提问，或根据文字画图。内置的小模型 viscpm-tiny 只认识图形：圆形、正方形、三角形和五角星，共十种颜色。",
        "Ask about pictures, or paint pictures from words. The embedded model, viscpm-tiny, knows nothing but shapes: "
        "circles, squares, triangles and stars in ten colours.",
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
    "conversation_hint": (
        "选一张图片，然后提问，或点一个问题：",
        "Choose a picture, then ask about it, or click a question:",
    ),
    "sample_what": ("图里有什么？", "What is in the picture?"),
    "sample_describe": ("请用一句话描述这张图片。", "Describe the picture in one sentence."),
    "sample_count": ("图中有几个图形？", "How many shapes are there?"),
    "sample_special": ("这张图片有什么特别之处？", "What is unusual about the picture?"),
    "first_a_picture": (
        "请先选一张图片：上传、拍摄，或点一张示例图片。",
        "Choose a picture first: upload one, take one, or click a sample.",
    ),
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
    "cut": ("已达到最大长度，可在“设置”里调大。", "It ends at the greatest length, which the settings can raise."),
    "stopped": ("已停止。", "Stopped."),
    "new_conversation": ("图片换了：新的对话开始。", "Another picture: a new conversation begins."),
    "cleared": ("对话已清空。", "The conversation is cleared."),
    "no_picture": (
        "还没有图片，所以回答只依据文字；请先选一张图片，再就它提问。",
        "There is no picture yet, so the answer goes by your words alone: choose a picture to ask about it.",
    ),
    "no_question": ("请先输入问题。", "Please type a question first."),
    "nothing_to_retry": ("还没有可以重答的问题。", "There is no question to answer again yet."),
    # live
    "live": ("实时", "Live"),
    "live_question": ("一直要回答的问题（空着则描述看到的）", "The question to keep answering (none: what is seen)"),
    "live_listen": ("说出问题", "Say it"),
    "live_camera": ("打开摄像头", "Camera"),
    "live_file": ("视频文件", "Video file"),
    "live_stop": ("停止", "Stop"),
    "live_speak": ("朗读回答", "Speak the answers"),
    "live_hint": (
        "画面逐帧送往本服务，不保存；来不及看的画面会跳过。",
        "Frames go to this server and are not kept; those that come too fast are dropped.",
    ),
    "live_rate": ("每秒 {rate} 次回答，跳过 {dropped} 帧", "{rate} answers a second, {dropped} frames dropped"),
    "live_denied": (
        "摄像头打不开：请在浏览器中允许使用，地址须是 localhost 或 https。",
        "The camera can't be opened: allow it in the browser, which wants localhost or https.",
    ),
    "live_no_video": (
        "浏览器放不了这个文件，请换 MP4 或 WebM。",
        "The browser can't play this file: take MP4 or WebM.",
    ),
    "live_gone": ("服务没有回应，正在重试。", "The server doesn't answer; trying again."),
    # paint
    "prompt": ("提示词", "Prompt"),
    "prompt_hint": ("右边有一个蓝色的五角星（回车开始画）", "a red circle on the left (Enter paints)"),
    "negative": ("反向提示词（不要画什么）", "Negative prompt (what not to paint)"),
    "draw": ("画图", "Paint"),
    "preset": ("预设", "Preset"),
    "preset_reference": ("原版（DDPM，50 步）", "Reference (DDPM, 50 steps)"),
    "preset_quality": ("优质（25 步）", "Quality (25 steps)"),
    "preset_fast": ("快速（12 步）", "Fast (12 steps)"),
    "steps": ("步数（越多越慢，越细致）", "Steps (more: slower and finer)"),
    "guidance": ("引导系数（越大越贴近提示词）", "Guidance (higher: closer to the prompt)"),
    "size": ("边长（像素）", "Size (pixels a side)"),
    "candidates": ("候选图数量", "Number of candidates"),
    "random_seed": ("每次换一个随机种子", "Another random seed each time"),
    "seed": ("种子（相同的种子画出相同的图）", "Seed (the same one paints the same again)"),
    "gallery": ("图片", "Pictures"),
    "downloads": ("下载（PNG 内含全部设置）", "Download (all settings are inside the PNG)"),
    "starting": ("等待画图……", "Waiting to paint ..."),
    "painting": ("正在画图：第 {done} 步，共 {total} 步", "Painting: step {done} of {total}"),
    "ideas": ("试试这些：", "Try one of these:"),
    "idea_circle": ("左边有一个红色的圆形", "a red circle on the left"),
    "idea_star": ("右边有一个蓝色的五角星", "a blue star on the right"),
    "idea_square": ("中间有一个绿色的正方形", "a green square in the middle"),
    "idea_cat": ("一只戴草帽的橘猫，水彩画", "an orange cat in a straw hat, watercolour"),
    "idea_river": ("江南水乡的清晨，水墨画", "a misty morning in a river town, ink painting"),
    "idea_train": ("黄昏，雪山下的红色小火车", "a little red train below snowy mountains at dusk"),
    "gallery_hint": ("画好的图片显示在这里。", "What is painted appears here."),
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
    "bad_picture": (
        "这张图片无法使用：请换一张完好的 JPEG、PNG、WebP、GIF、BMP 或 TIFF 图片，不超过 5000 万像素。",
        "{detail}",
    ),
    "no_memory": (
        "内存不足，请换小一些的尺寸或长度再试。",
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
