"""`viscpm-hf live`: videos in bounded processes, the newest frame, engines and endpoints."""

import json
import threading

import av
import PIL.Image
import pytest
import uvicorn

from viscpm_hf import VisCPMChat
from viscpm_hf.cli import main
from viscpm_hf.images.video import BadVideoError, VideoFrames, VideoLimits
from viscpm_hf.serving.app import create_app
from viscpm_hf.serving.engine import ChatEngine
from viscpm_hf.serving.live import EndpointEyes, EngineEyes
from viscpm_hf.serving.server import bind
from viscpm_hf.shapes import draw, make_scene


QUESTION = "What color is it?"
SIDE = 224
SCENES = [make_scene("test", index, num_shapes=1) for index in (2, 5)]
FRAMES_EACH, RATE = 20, 25


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A shape for 0.8 seconds, then another."""
    path = tmp_path_factory.mktemp("video") / "two.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream(
            "mpeg4", rate=RATE, width=SIDE, height=SIDE, pix_fmt="yuv420p", bit_rate=8_000_000
        )
        for scene in SCENES:
            frame = av.VideoFrame.from_image(draw(scene, SIDE))
            for _ in range(FRAMES_EACH):
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def chat():
    return VisCPMChat("viscpm-tiny", device="cpu")


@pytest.fixture(scope="module")
def engine(chat):
    engine = ChatEngine(chat)
    yield engine
    engine.close(drain=False)


@pytest.fixture(scope="module")
def answers(chat):
    """What is to be said of the two."""
    ask = lambda scene: chat.ask(draw(scene, SIDE), QUESTION, mode="generate", max_new_tokens=48).answer  # noqa: E731
    return [ask(scene) for scene in SCENES]


@pytest.fixture(scope="module")
def endpoint(engine):
    """The server's own OpenAI-compatible interface."""
    server = uvicorn.Server(uvicorn.Config(create_app(engine, chat_name="tiny"), log_config=None))
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join()


def test_frames_come_when_they_are_due_and_the_newest_counts(video):
    with VideoFrames(video) as frames:
        seen = list(frames)
    moments = [moment for moment, _ in seen]
    assert len(seen) + frames.num_dropped == 2 * FRAMES_EACH
    assert moments == sorted(moments) and moments[-1] == pytest.approx((2 * FRAMES_EACH - 1) / RATE)
    assert {frame.size for _, frame in seen} == {(SIDE, SIDE)}

    with VideoFrames(video, VideoLimits(max_side=56)) as frames:
        _, frame = next(iter(frames))
        assert frame.size == (56, 56)
        with frames._changed:  # whoever is busy meanwhile
            frames._changed.wait_for(lambda: frames._end)
        assert [moment for moment, _ in frames] == [moments[-1]]
        assert frames.num_dropped == 2 * FRAMES_EACH - 2


def test_what_is_no_video_is_refused_in_one_sentence(video, tmp_path):
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{video}\n#EXT-X-ENDLIST\n")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:500])
    for path, limits, reason in (
        (playlist, {}, "a video is one of"),
        (tmp_path / "picture.png", {}, "a video is one of"),
        (tmp_path / "cut.mp4", {}, "can't be read as a video"),
        (video, {"max_pixels": 100}, "224 x 224 pixels, more than the 100 that"),
        (video, {"max_memory_bytes": 2**20}, "memory|ended|can't be read|no frames"),
    ):
        with pytest.raises(BadVideoError, match=reason), VideoFrames(path, VideoLimits(**limits)) as frames:
            list(frames)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        VideoFrames(tmp_path / "nowhere.mp4")


def test_in_a_terminal(video, answers, capsys):
    assert main(["live", "viscpm-tiny", str(video), QUESTION, "--device", "cpu"]) == 0
    *told, last = capsys.readouterr().out.splitlines()
    assert [line.partition(" s  ")[2] for line in told] == answers
    assert float(told[0].split()[0]) < FRAMES_EACH / RATE <= float(told[1].split()[0])
    assert "a second; frames dropped: " in last


def test_through_an_endpoint(video, endpoint, answers, capsys):
    assert main(["live", "tiny", str(video), QUESTION, "--endpoint", endpoint, "--json"]) == 0
    told = [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]
    assert list(dict.fromkeys(told)) == answers
    assert main(["live", "other", str(video), QUESTION, "--endpoint", endpoint]) == 1
    assert capsys.readouterr().err == "viscpm-hf: error: The endpoint gave no answer: NotFoundError.\n"


def test_eyes_say_what_the_chat_says(engine, endpoint, answers):
    there = EndpointEyes(endpoint, "tiny")
    for eyes in (EngineEyes(engine), there):
        assert [eyes.look(draw(scene, SIDE), QUESTION) for scene in SCENES] == answers
    there.close()
