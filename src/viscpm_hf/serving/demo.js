// gradio's own texts stand in the browser's language: they are made English here, and follow the page's from there.
Object.defineProperty(navigator, "language", {get: () => "en"});
Object.defineProperty(navigator, "languages", {get: () => ["en"]});

const GRADIO_TEXTS = [
    [/^More tabs$/, "更多标签页"],
    [/^Fullscreen$/, "全屏"],
    [/^(Exit fullscreen mode|Exit Fullscreen)$/, "退出全屏"],
    [/^Remove Image$/, "移除图片"],
    [/^Drop an image file here to upload$/, "把图片拖到这里上传"],
    [/^File upload$/, "选择文件"],
    [/^Upload file$/, "上传图片"],
    [/^Capture from camera$/, "用摄像头拍摄"],
    [/^Paste from clipboard$/, "从剪贴板粘贴"],
    [/^Click to Access Webcam$/, "点击打开摄像头"],
    [/^(Click to access webcam|Grant webcam access)$/i, "点击允许使用摄像头"],
    [/^(Capture|capture photo)$/i, "拍照"],
    [/^(select input source)$/i, "选择摄像头"],
    [/^Thumbnail (\d+) of (\d+)$/, "第 $1 张，共 $2 张"],
    [/^Select example (\d+): (.*)$/, "示例问题 $1：$2"],
    [/^Clear$/, "清空"],
    [/^Close$/, "关闭"],
    [/^Download$/, "下载"],
    [/^Previous$/, "上一张"],
    [/^Next$/, "下一张"],
    [/^chatbot conversation$/, "对话记录"],
    [/^user's message: ([^]*)$/, "提问：$1"],
    [/^bot's message: ([^]*)$/, "回答：$1"],
    [/^Warning$/, "注意"],
    [/^Reset to default value$/, "恢复默认值"],
    [/^number input for (.*)$/, "输入数值：$1"],
    [/^range slider for (.*)$/, "拖动调整：$1"],
];
const WORDED = ["aria-label", "title", "placeholder"];
const english = new WeakMap(); // of an element: what gradio had written into its attributes, or as its text

function translated(text) {
    const entry = document.documentElement.lang === "zh" && GRADIO_TEXTS.find(([pattern]) => pattern.test(text.trim()));
    return entry ? text.trim().replace(...entry) : text;
}

function translate(node, name) {
    const written = english.get(node) || english.set(node, {}).get(node);
    const now = name ? node.getAttribute(name) : node.data;
    if (written[name]?.shown !== now) written[name] = {original: now};
    const shown = translated(written[name].original);
    written[name].shown = shown;
    if (shown === now) return;
    if (name) node.setAttribute(name, shown);
    else node.data = shown;
}

function translateWithin(root) {
    for (const name of WORDED) {
        if (root.hasAttribute(name)) translate(root, name);
        for (const element of root.querySelectorAll(`[${name}]`)) translate(element, name);
    }
    const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) translate(texts.currentNode);
    // Buttons are no items of a list, whose role gradio gives to what holds them.
    for (const list of root.querySelectorAll("[role=list]:has(> button)")) list.setAttribute("role", "group");
}

function speak(language) {
    document.documentElement.lang = language;
    translateWithin(document.body);
    return [language];
}

new MutationObserver((changes) => {
    for (const {type, target, addedNodes, attributeName} of changes) {
        if (type === "attributes") translate(target, attributeName);
        if (type === "characterData") translate(target);
        for (const node of addedNodes) {
            if (node.nodeType === Node.ELEMENT_NODE) translateWithin(node);
            if (node.nodeType === Node.TEXT_NODE) translate(node);
        }
    }
}).observe(document.documentElement, {
    subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: WORDED,
});
