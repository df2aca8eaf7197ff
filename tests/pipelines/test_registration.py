"""How diffusers comes to know the pipelines: each case is a process of its own, since importing can't be undone."""

import os
import subprocess
import sys

import pytest


KINDS = ("", "ControlNet", "Img2Img", "Inpaint")
ALL = str([f"VisCPMPaint{kind}Pipeline" for kind in KINDS])
FOUND = f"assert [getattr(diffusers, name).__name__ for name in {ALL}] == {ALL}"


def run(code: str, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import viscpm_hf, sys; assert 'diffusers' not in sys.modules; import diffusers",
        "import diffusers, viscpm_hf, sys; assert 'viscpm_hf.pipelines.pipeline_viscpm_paint' not in sys.modules",
        "from diffusers import AutoPipelineForImage2Image; import viscpm_hf, diffusers",
    ],
    ids=["before diffusers", "after diffusers", "after an auto pipeline"],
)
def test_pipelines_are_attributes_of_diffusers(code):
    tables = "from diffusers import AutoPipelineForImage2Image; from diffusers.pipelines import auto_pipeline"
    table = "auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING['viscpm-paint'].__name__ == 'VisCPMPaintInpaintPipeline'"
    missing = "assert not hasattr(diffusers, 'NoSuchPipeline')"
    same = "import pickle; assert pickle.loads(pickle.dumps(diffusers)) is diffusers"
    run("\n".join([code, FOUND, tables, f"assert {table}", missing, same]))


def test_diffusers_imported_in_whole():
    run(f"import viscpm_hf, diffusers\n{FOUND}", DIFFUSERS_SLOW_IMPORT="1")
