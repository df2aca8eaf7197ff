"""What is refused, and what is uploaded; the Hub is played by a class of the tests."""

import fnmatch
import glob
import json
import pickle
import shutil

import pytest
from safetensors.torch import load_file, save_file

from viscpm_hf import ConversionError, publish
from viscpm_hf.conversion.quantized import convert_quantized


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
    "no JSON": (lambda folder: (folder / "generation_config.json").write_text("{"), "holds no JSON"),
    "spoilt card": (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), "as a model card"),
    "key in the card": (
        lambda folder: (folder / "README.md").open("a").write("hf_" + "a1B2" * 9),
        r"looks like a key \(hf_a1B...\)",
    ),
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


# -------------------------------------------------------------------------------------------- names and what they hold

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(20)
NAMES = ["figure[1].png", "a*b.png", "?.png", "{x}!.png", "[!a].png", "图 1.png", "assets/[0].png", " .png"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_names(own_converted, name):
    """What is reported is sent, and nothing that the name would match as a pattern."""
    for picture in (name, *("figure1.png", "aXb.png", "y.png", "b.png", "assets/0.png")):
        (own_converted / picture).parent.mkdir(exist_ok=True)
        (own_converted / picture).write_bytes(PICTURE)
    hub = Hub()
    publication = publish(own_converted, "owner/name", api=hub)
    assert name in publication.files
    for file in (path.relative_to(own_converted).as_posix() for path in own_converted.rglob("*") if path.is_file()):
        matching = [pattern for pattern in hub.uploaded[0]["allow_patterns"] if fnmatch.fnmatch(file, pattern)]
        assert matching == [glob.escape(file)] and file in publication.files


class Harmless:
    def __reduce__(self):
        return print, ("run",)


STRANGE = {
    ".env": b"KEY=1",
    "?env": b"KEY=1",
    ".git/config": b"",
    ".netrc": b"",
    "secrets.json": b"{}",
    "secrets_prod.txt": b"",
    "hf_token": b"hf_x",
    "token.txt": b"x",
    "id_rsa": b"x",
    "server.pem": b"x",
    "weights.npz": b"PK",
    "model.pt2": b"PK",
    "module.so": b"x",
    "configuration_cpm_bee.pyc": b"x",
    "__pycache__/x.pyc": b"x",
    "wandb/run/config.yaml": b"x",
    "runs/events": b"x",
    "checkpoints/checkpoint-1/config.json": b"{}",
    "assets/deeper/a.png": PICTURE,
    "notes.md": b"x",
    "train.jsonl": b"{}",
    "other.safetensors": b"x",
    "model-00099-of-00099.safetensors": b"x",
    "evil.py": b"import os",
    "figure.png": pickle.dumps(Harmless()),
    "figure2.png": b"no picture",
    "merges.txt": pickle.dumps(Harmless(), protocol=0),
    "LICENSE": pickle.dumps(Harmless(), protocol=4),
    "tokenizer.model": b"PK\x03\x04" + bytes(30),
    "added_tokens.json": b"{]",
    "CITATION.cff": b"\xff\xfe\0",
    "figure.svg": b"<svg><script/></svg>",
}
# What may be asked for by name.
ON_REQUEST = {
    "?env", "wandb/run/config.yaml", "runs/events", "checkpoints/checkpoint-1/config.json", "assets/deeper/a.png",
    "notes.md", "train.jsonl", "evil.py", "figure.svg",
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_what_does_not_belong_there_is_refused(own_converted, name):
    path = own_converted / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(STRANGE[name])
    hub = Hub()
    with pytest.raises(ConversionError, match="published") as error:
        publish(own_converted, "owner/name", api=hub)
    assert str(own_converted / name.partition("/")[0]) in str(error.value)
    if name not in ON_REQUEST:
        with pytest.raises(ConversionError, match="published|safetensors"):
            publish(own_converted, "owner/name", include=[name], api=hub)
    assert not hub.created and not hub.uploaded


def test_further_files_by_name(own_converted):
    (own_converted / "notes.md").write_text("Trained on shapes.")
    assert "notes.md" in publish(own_converted, "owner/name", include=["notes.md"], dry_run=True).files
    with pytest.raises(FileNotFoundError, match="has no other.md"):
        publish(own_converted, "owner/name", include=["notes.md", "other.md"], dry_run=True)


def test_what_tools_leave_is_no_reason_to_stop(own_converted):
    for name in (".gitattributes", ".cache/huggingface/x.lock"):
        (own_converted / name).parent.mkdir(parents=True, exist_ok=True)
        (own_converted / name).write_text("x")
    files = publish(own_converted, "owner/name", dry_run=True).files
    assert not any(name.startswith(".") for name in files)


@pytest.mark.parametrize("quantization", ["8bit", "int8wo"])
def test_quantized(golden, tmp_path, quantization):
    folder = tmp_path / "model"
    convert_quantized(golden.weights, folder, quantization)
    assert "model.safetensors" in publish(folder, "owner/name", dry_run=True).files
    layer = "model.language_model.layers.0.mlp.down_proj"
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.startswith(layer)}, folder / "model.safetensors"
    )
    with pytest.raises(ConversionError, match=rf"1 tensors missing \({layer}.weight\), 0 surplus"):
        publish(folder, "owner/name", dry_run=True)
