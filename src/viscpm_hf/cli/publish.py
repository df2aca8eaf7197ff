"""`viscpm-hf publish`: a converted folder goes to the Hub."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .words import count


if TYPE_CHECKING:
    from ..conversion.publish import Publication


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "publish",
        examples=(
            "viscpm-hf publish viscpm-chat NAME/viscpm-chat --dry-run",
            "viscpm-hf publish viscpm-chat NAME/viscpm-chat --private",
        ),
        help="check a converted folder and upload it / 检查并上传",
        description="Check a converted folder and upload it to the Hub. / 检查转换后的文件夹并上传到 Hub。",
    )
    parser.add_argument("folder", metavar="OUT", help="what convert wrote / 转换后的文件夹")
    parser.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME / 仓库")
    parser.add_argument("--private", action="store_true", help="a new repository is private / 私有仓库")
    parser.add_argument(
        "--include", action="append", default=[], metavar="FILE", help="upload this file of OUT too / 同时上传该文件"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, and list the files / 仅检查并列出文件")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..conversion.publish import publish

    publication = publish(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private,
        dry_run=arguments.dry_run,
        include=arguments.include,
    )
    print(describe(publication))
    return 0


def describe(publication: Publication) -> str:
    """For people."""
    from ..plain_text import size_text

    total = f"{count(len(publication.files), 'file')}, {size_text(publication.num_bytes)}"
    if publication.is_dry_run:
        lines = [f"{size:>15,}  {name}" for name, size in publication.files.items()]
        return "\n".join([*lines, f"would upload to {publication.repo_id}: {total}"])
    return f"uploaded to {publication.url or publication.repo_id}: {total}"
