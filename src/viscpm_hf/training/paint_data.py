"""Pictures with captions, from files: rows `{"image", "caption"}`, or `text` and `file_name` as image folders have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
from transformers.utils import logging

from ..modeling.image_processing_viscpm import VisCPMImageProcessor
from .chat_dataset import RowDataset
from .data_files import DataPart
from .records import BadRowError, ChatRecord, ImageSource, read_record


logger = logging.get_logger(__name__)

METADATA_NAME = "metadata.jsonl"
# Names that datasets of captions use, in the order of preference.
CAPTION_FIELDS = ("caption", "text")
IMAGE_FIELDS = ("image", "file_name", "image_path")


@dataclass(frozen=True)
class CaptionedImage:
    """A picture, unopened, and what it shows. `source`: file and line, for messages."""

    image: ImageSource
    caption: str
    source: str


def open_part(text: str) -> DataPart:
    """As [`DataPart.open`]; a folder with a `metadata.jsonl` is that file."""
    part_of_folder = Path(text).expanduser() / METADATA_NAME
    return DataPart.open(str(part_of_folder) if part_of_folder.is_file() else text)


def read_caption(
    row: Any, *, source: str, images_folder: Path | None, is_confined: bool = False, seed: Any = 0
) -> CaptionedImage:
    """A row as a picture with its caption; of several captions `seed` draws one.

    Raises:
        BadRowError: saying what is wrong with the row.
    """
    if not isinstance(row, Mapping):
        raise BadRowError(f"{source}: a row is an object with fields, not {type(row).__name__}.")
    found = {}
    for name, fields in (("caption", CAPTION_FIELDS), ("image", IMAGE_FIELDS)):
        found[name] = next((row[field] for field in fields if row.get(field) is not None), None)
        if found[name] is None:
            raise BadRowError(f"{source}: no {' or '.join(fields)} among its fields: {', '.join(map(str, row))}.")
    record: ChatRecord = read_record(
        found, source=source, images_folder=images_folder, is_confined=is_confined, seed=seed
    )
    if len(record.images) != 1:
        raise BadRowError(f"{source}: {len(record.images)} pictures, but a caption belongs to one.")
    caption = record.turns[0][1].strip()
    if not caption:
        raise BadRowError(f"{source}: the caption is empty.")
    return CaptionedImage(record.images[0], caption, source)


class CaptionDataset(RowDataset):
    """The rows of several files that can be used. Captions are kept in memory, pictures are read when asked for.

    Args:
        check_caption: raises `ValueError` for a caption that can't be trained.
    """

    def __init__(
        self,
        parts: Sequence[DataPart],
        images: Path | None = None,
        bad_rows: str = "skip",
        check_caption: Callable[[str], Any] = len,
    ):
        self.captions: list[str] = []
        self._check_caption = check_caption
        super().__init__(parts, images, bad_rows)

    def _take(self, number: int, row: int, content: Any) -> None:
        item = self._read(read_caption, number, row, content)
        if isinstance(item.image, Path) and not item.image.is_file():
            raise BadRowError(f"{item.source}: there is no picture {item.image}.")
        self._check_caption(item.caption)
        self.captions.append(item.caption)
        self._part.append(number)
        self._row.append(row)

    def __getitem__(self, index: int) -> CaptionedImage:
        return self._item(read_caption, index)

    def source(self, index: int) -> str:
        return self.parts[self._part[index]].source.where(self._row[index])


def load_square(image: ImageSource, size: int) -> PIL.Image.Image:
    """The middle of a picture as an RGB square of `size` pixels.

    Raises:
        ValueError: for a file that is no picture, is damaged, or has too many pixels.
    """
    processor = VisCPMImageProcessor()
    picture = processor.process_image(processor.fetch_images(image), do_convert_rgb=True)
    return PIL.ImageOps.fit(picture, (size, size), PIL.Image.Resampling.LANCZOS)
