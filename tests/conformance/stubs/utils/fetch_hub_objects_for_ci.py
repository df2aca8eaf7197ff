"""In the place of transformers' file, which its source distribution lacks: no network, so pictures of our own."""

import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def url_to_local_path(url: str) -> str:
    """For the URL of an image the path of a file with random pixels, the same for the same URL; else the URL."""
    if not url.endswith(IMAGE_SUFFIXES):
        return url
    digest = sha256(url.encode()).digest()
    path = Path(tempfile.gettempdir()) / f"conformance-{digest[:8].hex()}.png"
    if not path.exists():
        pixels = np.random.default_rng(int.from_bytes(digest[:8], "big")).integers(0, 256, (120, 160, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return str(path)
