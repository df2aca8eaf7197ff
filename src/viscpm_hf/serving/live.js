// The live page: frames of a camera or a video file, each answered before the next is taken; the newest one counts.
const MAX_SIDE = 672;
const SECONDS_AFTER_ERROR = 1;
const Hearing = window.SpeechRecognition || window.webkitSpeechRecognition;
const live = {run: 0, stream: null, answers: 0, answer: ""};

const part = (name) => document.getElementById(`live-${name}`);

function liveText(key, values = {}) {
    const texts = part("texts").querySelector(`[data-key=${key}]`).innerHTML;
    return texts.replaceAll(/\{(\w+)\}/g, (_, name) => values[name]);
}

function sayOfAnswer(html, isError) {
    part("answer").innerHTML = html;
    part("answer").classList.toggle("status-error", isError);
}

async function startLive(open) {
    stopLive();
    const run = ++live.run;
    part("stop").disabled = false;
    const video = part("video");
    try {
        await open(video);
        await video.play();
    } catch (error) {
        stopLive();
        sayOfAnswer(liveText(error.name === "NotSupportedError" ? "live_no_video" : "live_denied"), true);
        return;
    }
    live.answers = 0;
    live.answer = "";
    const begin = performance.now();
    let shown = 0, first = null;
    const count = (_, frame) => {
        first ??= frame.presentedFrames - 1;
        shown = frame.presentedFrames - first;
        if (run === live.run) video.requestVideoFrameCallback(count);
    };
    video.requestVideoFrameCallback(count);
    while (run === live.run) {
        const isAnswered = await lookOnce(video, run);
        if (run !== live.run) return;
        if (!isAnswered) {
            await new Promise((resolve) => setTimeout(resolve, 1000 * SECONDS_AFTER_ERROR));
            continue;
        }
        live.answers += 1;
        const rate = (1000 * live.answers / (performance.now() - begin)).toFixed(1);
        part("rate").innerHTML = liveText("live_rate", {rate, dropped: Math.max(0, shown - live.answers)});
        part("rate").dataset.rate = rate;
    }
}

async function lookOnce(video, run) {
    const scale = Math.min(1, MAX_SIDE / Math.max(video.videoWidth, video.videoHeight, 1));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(scale * video.videoWidth));
    canvas.height = Math.max(1, Math.round(scale * video.videoHeight));
    canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
    const frame = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.85));
    const language = document.documentElement.lang;
    const asked = new URLSearchParams({language, question: part("question").value});
    let reply;
    try {
        const options = {method: "POST", headers: {"content-type": "image/jpeg"}, body: frame};
        reply = await (await fetch(`./viscpm-hf/live?${asked}`, options)).json();
    } catch {
        if (run === live.run) sayOfAnswer(liveText("live_gone"), true);
        return false;
    }
    if (run !== live.run) return true;
    if (reply.error) {
        part("answer").textContent = reply.error[language];
        part("answer").classList.add("status-error");
        return false;
    }
    if (reply.answer === live.answer) return true;
    live.answer = reply.answer;
    part("answer").classList.remove("status-error");
    part("answer").textContent = reply.answer;
    // What changes while something is being said is dropped too.
    if (part("speak").checked && window.speechSynthesis && !speechSynthesis.speaking) {
        const words = new SpeechSynthesisUtterance(reply.answer);
        words.lang = /[\u4e00-\u9fff]/.test(reply.answer) ? "zh-CN" : "en-US";
        speechSynthesis.speak(words);
    }
    return true;
}

function stopLive() {
    live.run += 1;
    live.stream?.getTracks().forEach((track) => track.stop());
    live.stream = null;
    const video = part("video");
    video.pause();
    video.srcObject = null;
    if (video.src) URL.revokeObjectURL(video.src);
    video.removeAttribute("src");
    window.speechSynthesis?.cancel();
    part("stop").disabled = true;
}

async function openCamera(video) {
    live.stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}});
    video.srcObject = live.stream;
}

function listenLive() {
    const hearing = new Hearing();
    hearing.lang = document.documentElement.lang === "zh" ? "zh-CN" : "en-US";
    hearing.onresult = ({results}) => { part("question").value = results[0][0].transcript; };
    hearing.start();
}

document.addEventListener("click", ({target}) => {
    const id = target.closest?.("button")?.id;
    if (id === "live-camera") startLive(openCamera);
    if (id === "live-file") part("input").click();
    if (id === "live-stop") stopLive();
    if (id === "live-listen") listenLive();
});
document.addEventListener("change", ({target}) => {
    if (target.id !== "live-input" || !target.files.length) return;
    const [file] = target.files;
    startLive(async (video) => { video.src = URL.createObjectURL(file); });
    target.value = "";
});
new MutationObserver((_, observer) => {
    if (!part("listen")) return;
    part("listen").hidden = !Hearing;
    observer.disconnect();
}).observe(document.documentElement, {subtree: true, childList: true});
