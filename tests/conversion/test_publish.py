"""What is refused, and what is uploaded; the Hub is played by a class of the tests."""

import json
import shutil

import pytest

from viscpm_hf import ConversionError, publish


class Hub:
    """Keeps what it is asked to do."""

    def __init__(self):
        self.created, self.uploaded = [], []

    def create_repo(self, repo_id, **kwargs):
        self.created.append((repo_id, kwargs))

    def upload_folder(self, **kwargs):
        self.uploaded.append(kwargs)
        return "https://hub/commit"


def test_dry_run(converted, tmp_path):
    hub = Hub()
    publication = publish(converted, "owner/name", dry_run=True, api=hub)
    assert publication.is_dry_run and not hub.created and not hub.uploaded
    assert publication.files == {path.name: path.stat().st_size for path in converted.iterdir()}


def test_upload(converted):
    hub = Hub()
    publication = publish(converted, "owner/name", private=True, api=hub)
    assert hub.created == [("owner/name", {"private": True, "exist_ok": True})]
    assert hub.uploaded[0]["folder_path"] == converted
    assert hub.uploaded[0]["allow_patterns"] == sorted(publication.files)
    assert publication.url == "https://hub/commit"


def test_paint(converted_paint):
    assert "unet/config.json" in publish(converted_paint, "owner/name", dry_run=True).files


def spoil_weights(folder):
    path = next(folder.glob("model-00002*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def drop_licence(folder):
    card = folder / "README.md"
    card.write_text(card.read_text("utf-8").replace("license: other\n", ""), "utf-8")


def drop_a_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] -= 1
    (folder / "config.json").write_text(json.dumps(config))


UNFIT = {
    "pickle": (lambda folder: (folder / "optimizer.pt").write_bytes(b"x"), "optimizer.pt is a pickle"),
    "no card": (lambda folder: (folder / "README.md").unlink(), "no model card"),
    "no licence": (drop_licence, "names no licence"),
    "spoilt weights": (spoil_weights, "isn't what was converted"),
    "no weights": (lambda folder: next(folder.glob("model-00002*")).unlink(), "lacks model-00002"),
    "other configuration": (drop_a_layer, "surplus"),
    "link": (lambda folder: (folder / "secret").symlink_to("/etc/hostname"), "symbolic link"),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_unfit_folders_are_refused(own_converted, reason):
    spoil, message = UNFIT[reason]
    spoil(own_converted)
    hub = Hub()
    with pytest.raises((ConversionError, OSError), match=message):
        publish(own_converted, "owner/name", api=hub)
    assert not hub.created and not hub.uploaded


def test_what_is_no_converted_folder(golden, original_folder, converted, tmp_path):
    with pytest.raises(ConversionError, match="convert it first"):
        publish(original_folder, "owner/name", dry_run=True)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        publish(tmp_path / "nowhere", "owner/name", dry_run=True)
    shutil.copytree(converted, tmp_path / "out.partial")
    with pytest.raises(ConversionError, match="unfinished"):
        publish(tmp_path / "out.partial", "owner/name", dry_run=True)
    with pytest.raises(ConversionError, match="OWNER/NAME"):
        publish(converted, "name", dry_run=True)
