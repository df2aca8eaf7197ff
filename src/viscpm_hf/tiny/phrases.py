"""How people ask: several ways for every question of the demo world, in both languages.

`{it}` is a shape as the question names it ("the red circle", "红色的圆形"), `{one}` the same with an article in
English, `{many}` its plural; `{place}` a place, `{first}` and `{second}` two sides to choose from.
"""

PHRASES = {
    "colour_of_only": {
        "en": ("What color is it?", "What colour is the shape?", "What color is this?", "Which color is the shape?",
               "What is the color of the shape?", "What color is the shape in the picture?"),
        "zh": ("它是什么颜色的？", "这个图形是什么颜色？", "图形是什么颜色的？", "这是什么颜色？",
               "图中的图形是什么颜色？", "图片里的图形是什么颜色？"),
    },
    "colour_of_it": {
        "en": ("What color is it?", "What colour is it?", "Which color is it?", "And what color is it?"),
        "zh": ("它是什么颜色的？", "它是什么颜色？", "是什么颜色的？", "那它是什么颜色？"),
    },
    "colour": {
        "en": ("What color is the {it}?", "What colour is the {it}?", "Which color is the {it}?",
               "What is the color of the {it}?", "What color does the {it} have?"),
        "zh": ("{it}是什么颜色？", "{it}是什么颜色的？", "图中的{it}是什么颜色？", "{it}的颜色是什么？",
               "图片里的{it}是什么颜色的？"),
    },
    "shape_of_only": {
        "en": ("What shape is this?", "What shape is it?", "What is this?", "What is in the picture?",
               "Which shape is in the image?", "What shape is in the picture?"),
        "zh": ("这是什么形状？", "这是什么图形？", "图中是什么形状？", "图片里是什么？", "它是什么形状的？",
               "这是什么？"),
    },
    "shape_of_it": {
        "en": ("What shape is it?", "Which shape is it?", "And what shape is it?"),
        "zh": ("它是什么形状的？", "它是什么形状？", "是什么形状的？", "那它是什么形状？"),
    },
    "shape": {
        "en": ("What shape is {it}?", "Which shape is {it}?", "What is the {it} shape?", "What shape is the {it} one?",
               "Which shape has the color {it}?"),
        "zh": ("{it}的是什么形状？", "{it}的图形是什么形状？", "{it}的是什么？", "什么图形是{it}的？",
               "哪个形状是{it}的？"),
    },
    "count": {
        "en": ("How many shapes are there?", "How many shapes are in the picture?", "How many shapes do you see?",
               "How many shapes are in the image?", "Count the shapes."),
        "zh": ("图中有几个图形？", "有几个图形？", "图片里有多少个图形？", "一共有几个形状？", "数一数有几个图形。"),
    },
    "count_of": {
        "en": ("How many {many} are there?", "How many {many} are in the picture?", "How many {many} do you see?",
               "How many {many} are in the image?"),
        "zh": ("图中有几个{it}？", "有几个{it}？", "图片里有多少个{it}？", "一共有几个{it}？"),
    },
    "where_is_only": {
        "en": ("Where is it?", "Where is the shape?", "Where is the shape in the picture?"),
        "zh": ("它在哪里？", "图形在哪里？", "图形在图中的什么位置？"),
    },
    "where_is_it": {
        "en": ("Where is it?", "And where is it?", "Where is it in the picture?"),
        "zh": ("它在哪里？", "它在哪儿？", "那它在哪里？", "它在什么位置？"),
    },
    "where": {
        "en": ("Where is the {it}?", "Where is the {it} in the picture?", "Where do you see the {it}?"),
        "zh": ("{it}在哪里？", "{it}在什么位置？", "{it}在图中的什么位置？", "{it}在哪儿？"),
    },
    "which_side": {
        "en": ("Is the {it} {first} or {second}?", "Is the {it} {first} or {second} of the picture?"),
        "zh": ("{it}在{first}还是{second}？", "{it}在图中的{first}还是{second}？"),
    },
    "is_there": {
        "en": ("Is there {one}?", "Is there {one} in the picture?", "Do you see {one}?", "Can you see {one}?"),
        "zh": ("有{it}吗？", "图中有{it}吗？", "图片里有没有{it}？", "你看到{it}了吗？"),
    },
    "is_coloured": {
        "en": ("Is the {it} {colour}?", "Is the color of the {it} {colour}?"),
        "zh": ("{it}是{colour}的吗？", "{it}是不是{colour}的？"),
    },
    "is_placed": {
        "en": ("Is the {it} {place}?", "Is the {it} {place} of the picture?"),
        "zh": ("{it}在{place}吗？", "{it}是在{place}吗？"),
    },
    "describe": {
        "en": ("Describe the picture.", "Describe the picture in one sentence.", "Describe this image.",
               "What do you see?", "What is in this picture? Answer in one sentence."),
        "zh": ("描述这张图片。", "请用一句话描述这张图片。", "描述一下图片。", "你看到了什么？",
               "用一句话说说图中有什么。"),
    },
    "and_the": {
        "en": ("And the {it}?", "What about the {it}?", "And what about the {it}?"),
        "zh": ("那{it}呢？", "{it}呢？", "那么{it}呢？"),
    },
}  # fmt: skip

# The same thing is meant in every one of these; a prompt names a place or leaves it open.
PAINT_PHRASES = {
    "en": ("{one}", "{one}", "a picture of {one}", "draw {one}", "paint {one}"),
    "zh": ("{it}", "一个{it}", "画一个{it}", "一张{it}的图片", "一幅{it}的画"),
}
PAINT_PHRASES_WITH_PLACE = {
    "en": ("{one} {place}", "{one} {place}", "a picture of {one} {place}", "draw {one} {place}", "{place}, {one}"),
    "zh": ("{place}有一个{it}", "{place}的{it}", "在{place}画一个{it}", "一个{it}，在{place}", "{it}在{place}"),
}
