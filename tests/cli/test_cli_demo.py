"""`viscpm-hf demo`: the embedded model at work in a terminal."""

import PIL.Image

from viscpm_hf.cli import main


def test_the_demo_answers_and_paints(capsys, tmp_path):
    assert main(["demo", "--terminal", "--output", str(tmp_path / "new")]) == 0
    output = capsys.readouterr().out
    assert output.count("Q: ") == output.count("A: ") >= 4
    assert "图中有几个图形？" in output and "个。" in output
    pictures = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in pictures] == ["demo-painted-1.png", "demo-painted-2.png", "demo-picture.png"]
    for path in pictures:
        assert PIL.Image.open(path).size >= (64, 64)
