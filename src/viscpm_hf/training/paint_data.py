"""Pictures with captions, from files: rows `{"image", "caption"}`, or `text` and `file_name` as image folders have."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
from tqdm import tqdm
from transformers.utils import logging

from ..modeling.image_processing_viscpm import VisCPMImageProcessor
from .chat_dataset import SkippedRows
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


class CaptionDataset(Sequence[CaptionedImage]):
    """The rows of several files that can be used. Captions are kept in memory, pictures are read when asked for.

    Args:
        parts: what to mix.
        images: folder of the pictures; None: beside each file.
        bad_rows: `"skip"` reports and counts them in `skipped`, `"fail"` raises the first.
        check_caption: raises `ValueError` for a caption that can't be trained.

    Raises:
        BadRowError: for the first bad row, if they are to fail.
        ValueError: if a part has no row that can be used.
    """

    def __init__(
        self,
        parts: Sequence[DataPart],
        images: Path | None = None,
        bad_rows: str = "skip",
        check_caption: Callable[[str], Any] = len,
    ):
        self.parts, self.images = list(parts), images
        self.skipped = SkippedRows()
        self.captions: list[str] = []
        self.sizes: list[int] = []
        """Rows of every part."""
        self._part, self._row = array("H"), array("q")
        for number, part in enumerate(self.parts):
            before, num_rows = len(self), 0
            for row, content in tqdm(part.source.scan(), desc=part.name, unit=" rows", disable=None):
                num_rows += 1
                try:
                    if isinstance(content, BadRowError):
                        raise content
                    item = self._read(number, row, content)
                    if isinstance(item.image, Path) and not item.image.is_file():
                        raise BadRowError(f"{item.source}: there is no picture {item.image}.")
                    check_caption(item.caption)
                except ValueError as error:
                    message = str(error) if isinstance(error, BadRowError) else f"{part.source.where(row)}: {error}"
                    if bad_rows == "fail":
                        raise BadRowError(message) from None
                    self.skipped.add("bad", message)
                    continue
                self.captions.append(item.caption)
                self._part.append(number)
                self._row.append(row)
            self.sizes.append(len(self) - before)
            if len(self) == before:
                first = f" The first: {self.skipped.reports[0]}" if self.skipped.reports else ""
                raise ValueError(f"{part.name}: none of its {num_rows} rows can be trained.{first}")

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> CaptionedImage:
        number, row = self._part[index], self._row[index]
        return self._read(number, row, self.parts[number].source.row(row))

    def source(self, index: int) -> str:
        return self.parts[self._part[index]].source.where(self._row[index])

    def _read(self, number: int, row: int, content: Any) -> CaptionedImage:
        rows = self.parts[number].source
        return read_caption(
            content,
            source=rows.where(row),
            images_folder=self.images or rows.folder,
            is_confined=self.images is not None,
            seed=row,
        )


def load_square(image: ImageSource, size: int) -> PIL.Image.Image:
    """The middle of a picture as an RGB square of `size` pixels.

    Raises:
        ValueError: for a file that is no picture, is damaged, or has too many pixels.
    """
    processor = VisCPMImageProcessor()
    picture = processor.process_image(processor.fetch_images(image), do_convert_rgb=True)
    return PIL.ImageOps.fit(picture, (size, size), PIL.Image.Resampling.LANCZOS)
