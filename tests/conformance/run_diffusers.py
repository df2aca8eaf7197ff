"""Runs diffusers' own pipeline test mixins on our pipelines: `make conformance DIFFUSERS=path of a checkout`.

Neither wheel nor source distribution of diffusers holds its tests, so a checkout is needed; the diffusers under test
is the installed one all the same.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SUITE = HERE / "diffusers"


def check_checkout(path: Path) -> Path:
    """The checkout, after making sure that it is one and has the mixins."""
    init = path / "src" / "diffusers" / "__init__.py"
    if not init.is_file() or not (path / "tests" / "pipelines" / "testing_utils").is_dir():
        raise SystemExit(
            f"{path} is no checkout of diffusers with tests/pipelines/testing_utils, which it has since 0.40."
        )
    found = re.search(r'^__version__ = "(.+)"$', init.read_text("utf-8"), re.MULTILINE)
    installed = version("diffusers")
    if found is None or found[1] != installed:
        print(f"The tests are those of diffusers {found and found[1]}; {installed} is installed.", flush=True)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="All else is handed on to pytest.", allow_abbrev=False
    )
    parser.add_argument("--diffusers", type=Path, metavar="PATH", required=True, help="a checkout of diffusers")
    options, pytest_arguments = parser.parse_known_args()
    checkout = check_checkout(options.diffusers.resolve())

    # -P: our own folder `tests` must not stand before diffusers'.
    pytest = [sys.executable, "-P", "-m", "pytest", "-c", str(REPOSITORY / "pyproject.toml")]
    settings = ["-p", "no:cacheprovider", "-W", "ignore", "--confcutdir", str(SUITE), "-o", "addopts=-ra"]
    settings += ["-o", "python_files=*.py", str(SUITE / "viscpm_paint.py")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            filter(
                None,
                [str(checkout), str(REPOSITORY / "src"), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH")],
            )
        ),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    return subprocess.run([*pytest, *settings, *pytest_arguments], env=environment, cwd=REPOSITORY).returncode


if __name__ == "__main__":
    sys.exit(main())
