"""`serve run` with the configuration of the examples: the same server, in replicas."""

import base64
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import httpx
import openai
import PIL.Image
import pytest
import yaml
from ray_support import EXAMPLES, PATIENCE, UNCHECKED, ServeRun
from serving_support import data_uri, question
from support import Golden

from viscpm_hf import VisCPMPaint


pytest.importorskip("ray", reason='the tests on Ray need it: pip install -c constraints.txt ".[ray]"')

GOLDEN = Golden("chat_a")
KEY = "a-key"
CONFIG = EXAMPLES / "serve.yaml"
QUESTIONS = [
    "what is this?",
    "图片里有什么？",
    "why?",
    "Describe it.",
    "它是什么颜色的？",
    "hello",
    "where?",
    "还有呢？",
]


@pytest.fixture(scope="module")
def chat():
    return GOLDEN.load_chat()


@pytest.fixture(scope="module")
def painter(ray_models):
    return VisCPMPaint(ray_models / "paint-a", **UNCHECKED)


@pytest.fixture(scope="module")
def url(cluster, ray_models):
    """Where `serve run` answers, with the configuration of the examples and our models in it."""
    config = yaml.safe_load(CONFIG.read_text("utf-8"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        config["http_options"]["port"] = probe.getsockname()[1]
    (ray_models / "key").write_text(KEY + "\n")
    chat, paint = config["applications"]
    chat["args"] |= {
        "model": str(ray_models / "chat-a"),
        "load": {"device": "cpu"},
        "api_key_file": str(ray_models / "key"),
        "other_names": ["paint-a"],
    }
    paint["args"] |= {"model": str(ray_models / "paint-a"), "name": "paint-a"}
    for application in (chat, paint):  # three replicas of two CPUs
        application["deployments"][0]["ray_actor_options"] = {"num_cpus": 0.5}
    chat["deployments"][0]["autoscaling_config"] |= {
        "target_ongoing_requests": 2, "upscale_delay_s": 0, "metrics_interval_s": 0.2, "look_back_period_s": 0.5,
    }  # fmt: skip
    (ray_models / "serve.yaml").write_text(yaml.safe_dump(config))
    run = ServeRun(ray_models / "serve.yaml", cluster)
    try:
        run.wait("chat", "paint")
        yield f"http://127.0.0.1:{config['http_options']['port']}"
    finally:
        run.stop()


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def ask(client, text, image=None, **options):
    return client.chat.completions.create(model="chat-a", messages=question(text, image), **options)


def metric(url, name):
    for line in httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise KeyError(name)


def test_answers_are_the_models(client, chat):
    picture = GOLDEN.image(0)
    expected = chat.ask(picture, "图片里有什么？", mode="generate", max_new_tokens=12)
    given = ask(client, "图片里有什么？", data_uri(picture), max_tokens=12)
    assert given.choices[0].message.content == expected.answer
    assert given.usage.completion_tokens == expected.num_tokens
    expected = chat.ask(None, "hello?", mode="generate", max_new_tokens=12)
    pieces = [piece.choices[0].delta.content for piece in ask(client, "hello?", max_tokens=12, stream=True)]
    assert "".join(filter(None, pieces)) == expected.answer
    assert len(pieces) > 6
    reference = ask(client, "what is this?", data_uri(picture), max_tokens=8, extra_body={"mode": "reference"})
    assert reference.choices[0].message.content == chat.chat(picture, "what is this?", max_new_tokens=8)[0]


def test_pictures_are_the_painters(client, url, painter):
    given = client.images.generate(
        model="paint-a", prompt="一只猫", size="16x16", n=2, extra_body={"steps": 2, "seed": 3}
    )
    expected = painter.generate_all("一只猫", num_images_per_prompt=2, generator=3, num_inference_steps=2).images
    images = [PIL.Image.open(BytesIO(base64.b64decode(image.b64_json))) for image in given.data]
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    linked = client.images.generate(
        model="paint-a", prompt="一只猫", size="16x16", response_format="url", extra_body={"steps": 2, "seed": 3}
    )
    assert PIL.Image.open(BytesIO(httpx.get(linked.data[0].url).content)).tobytes() == expected[0].tobytes()
    assert [model.id for model in client.models.list()] == ["chat-a", "paint-a"]


def test_what_is_asked_together_is_decoded_together(client, url, chat):
    expected = [chat.ask(None, text, mode="generate", max_new_tokens=60).answer for text in QUESTIONS]
    steps, rows = metric(url, "viscpm_decode_steps_total"), metric(url, "viscpm_decoded_rows_total")
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        answers = list(pool.map(lambda text: ask(client, text, max_tokens=60), QUESTIONS))
    assert [answer.choices[0].message.content for answer in answers] == expected
    steps, rows = metric(url, "viscpm_decode_steps_total") - steps, metric(url, "viscpm_decoded_rows_total") - rows
    assert rows > 2 * steps


def test_bad_requests_are_answered_as_by_the_server(client, url):
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        ask(client.with_options(api_key="wrong"), "hello")
    with pytest.raises(openai.BadRequestError, match="no valid base64|can't be read"):
        ask(client, "hello", "data:image/png;base64,AAAA")
    with pytest.raises(openai.NotFoundError, match="There is no model"):
        client.chat.completions.create(model="other", messages=question("hello"))
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_a_client_that_leaves_ends_its_answer(client, url):
    stream = ask(client, "hello", max_tokens=4000, temperature=2.0, stream=True)
    next(stream)
    stream.close()
    for _ in range(200):
        if metric(url, "viscpm_chat_running") == 0:
            break
    assert metric(url, "viscpm_chat_running") == 0
    assert metric(url, "viscpm_answer_tokens_total") < 4000


def test_chat_grows_with_its_load_and_paint_does_not(client, url):
    from ray import serve

    def replicas(application, deployment):
        return serve.status().applications[application].deployments[deployment].replica_states.get("RUNNING", 0)

    over = threading.Event()

    def work(text):
        while not over.is_set():
            ask(client, text, max_tokens=200)

    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        working = [pool.submit(work, text) for text in QUESTIONS]
        try:
            for _ in range(PATIENCE):
                if replicas("chat", "ChatDeployment") == 2 or over.wait(0.5):
                    break
            assert replicas("chat", "ChatDeployment") == 2
        finally:
            over.set()
    assert all(future.exception() is None for future in working)
    assert replicas("paint", "PaintDeployment") == 1


def test_a_lost_replica_takes_only_its_own_requests_along(client, url, chat):
    """Those end in an error that clients repeat on their own, whole answers and streams alike."""
    import ray

    expected = {text: chat.ask(None, text, mode="generate", max_new_tokens=200).answer for text in QUESTIONS}
    over, lost, wrong, num_answers = threading.Event(), [], [], []

    def work(text, stream):
        while not over.is_set():
            try:
                answer = ask(client, text, max_tokens=200, stream=stream)
                pieces = [piece.choices[0].delta.content or "" for piece in answer] if stream else []
                given = "".join(pieces) if stream else answer.choices[0].message.content
            except openai.APIError as error:
                lost.append(error)
                continue
            num_answers.append(text)
            if given != expected[text]:
                wrong.append(given)

    def wait_for(count):
        for _ in range(PATIENCE * 20):
            if len(num_answers) >= count or over.wait(0.05):
                break
        assert len(num_answers) >= count

    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        working = [pool.submit(work, text, bool(index % 2)) for index, text in enumerate(QUESTIONS)]
        try:
            wait_for(2 * len(QUESTIONS))
            actors = ray.util.list_named_actors(all_namespaces=True)
            name = next(actor["name"] for actor in actors if actor["name"].startswith("SERVE_REPLICA::chat#"))
            ray.kill(ray.get_actor(name, namespace="serve"))
            wait_for(len(num_answers) + 4 * len(QUESTIONS))
        finally:
            over.set()
    assert all(future.exception() is None for future in working) and not wrong
    assert 1 <= len(lost) <= len(QUESTIONS)
    for error in lost:
        assert error.code == "replica_lost" and "send the request again" in error.message
        if isinstance(error, openai.APIStatusError):
            assert error.status_code == 503 and int(error.response.headers["retry-after"]) > 0
    assert (
        ask(client.with_options(max_retries=5), "hello", max_tokens=200).choices[0].message.content
        == expected["hello"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"), [({"model": "x", "modle": 1}, "no argument modle"), ({}, "needs args: {model: FOLDER}")]
)
def test_wrong_arguments_are_one_sentence(arguments, message):
    from viscpm_hf.serving import ray_app

    for application in (ray_app.chat, ray_app.paint):
        with pytest.raises(ValueError, match=message):
            application(arguments)
