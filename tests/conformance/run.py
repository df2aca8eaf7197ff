"""Runs transformers' own test suite on our classes: `make conformance`, or this file.

The suite is in the source distribution of transformers, not in the wheel. It is fetched for the installed version,
kept in `.conformance-cache/` and put on the import path of a pytest run as the package `tests`; what the mixins import
but the distribution lacks comes from `stubs/`. With `--transformers PATH`, a checkout of the same version, nothing is
fetched, and the tests of generation and export, which the distribution lacks, run too.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CACHE = REPOSITORY / ".conformance-cache"


def fetch(release: str) -> Path:
    """The folder with the suite of that release, from the cache or from PyPI."""
    folder = CACHE / release
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    # Made whole beside its place and renamed, so a broken download is never taken for a suite.
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        source = ["--no-binary", "transformers", f"transformers=={release}", "--dest", work]
        if subprocess.run(download + source).returncode:
            raise SystemExit(
                f"The sources of transformers {release} can't be fetched from the package index. Give a checkout of "
                "this version: --transformers PATH."
            )
        suite = Path(work) / "suite"
        extract(next(Path(work).glob("transformers-*.tar.gz")), suite)
        suite.rename(folder)
    return folder


def extract(archive: Path, suite: Path) -> None:
    """Takes `tests/*.py` out of a source distribution, as plain files whatever the archive calls them."""
    (suite / "tests").mkdir(parents=True)
    with tarfile.open(archive) as sources:
        for member in sources:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                (suite / "tests" / parts[2]).write_bytes(sources.extractfile(member).read())
    if not (suite / "tests" / "test_modeling_common.py").is_file():
        raise SystemExit(f"{archive.name} has no tests/test_modeling_common.py: the suite has moved.")


def check_checkout(path: Path, release: str) -> Path:
    """The checkout, after making sure that it is one and of this release."""
    init = path / "src" / "transformers" / "__init__.py"
    if not init.is_file() or not (path / "tests" / "test_modeling_common.py").is_file():
        raise SystemExit(f"{path} is no checkout of transformers: it lacks src/transformers or tests.")
    found = re.search(r'^__version__ = "(.+)"$', init.read_text("utf-8"), re.MULTILINE)
    found = found and found[1]
    if found != release:
        raise SystemExit(f"{path} is transformers {found}, but {release} is installed: check out v{release}.")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="All else is handed on to pytest.", allow_abbrev=False
    )
    parser.add_argument("--transformers", type=Path, metavar="PATH", help="a checkout of the installed version")
    options, pytest_arguments = parser.parse_known_args()

    release = version("transformers")
    if options.transformers:
        suite = check_checkout(options.transformers.resolve(), release)
    else:
        suite = fetch(release)
        shutil.copytree(HERE / "stubs", suite, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))

    # -P: our own folder `tests` must not stand before the suite's.
    pytest = [sys.executable, "-P", "-m", "pytest", "-c", str(REPOSITORY / "pyproject.toml")]
    settings = ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestUnknownMarkWarning", "--disable-warnings"]
    settings += ["--confcutdir", str(HERE)]  # the fixtures of our own tests are not for this run
    for setting in ("addopts=", "testpaths=tests/conformance", "norecursedirs=stubs __pycache__"):
        settings += ["-o", setting]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(suite), str(REPOSITORY / "src"), os.environ.get("PYTHONPATH")])
        ),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "RUN_SLOW": os.environ.get("RUN_SLOW", "1"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    return subprocess.run([*pytest, *settings, *pytest_arguments], env=environment, cwd=REPOSITORY).returncode


if __name__ == "__main__":
    sys.exit(main())
