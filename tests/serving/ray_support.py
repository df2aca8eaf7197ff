"""A Ray cluster on this machine, and what is deployed on it."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from paint_support import components
from support import Golden

from viscpm_hf import VisCPMPaintPipeline


NUM_CPUS = 2
STORE_BYTES = 80 * 2**20
PATIENCE = 300
EXAMPLES = Path(__file__).parents[2] / "examples" / "ray"
UNCHECKED = {"add_ranker": False, "image_safety_checker": False, "prompt_safety_checker": False, "device": "cpu"}


def write_models(folder: Path) -> Path:
    Golden("chat_a").write_layout(folder / "chat-a")
    VisCPMPaintPipeline(**components()).save_pretrained(folder / "paint-a")
    return folder


@contextmanager
def ray_cluster() -> Iterator[str]:
    """A cluster of two CPUs that reports to nobody and keeps its files to itself; yields its address."""
    import ray

    # A short path: Ray's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        token = Path(folder) / "token"  # in place of the one in the user's own folder
        token.write_text(secrets.token_hex(32))
        settings = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(EXAMPLES), os.environ.get("PYTHONPATH")))),
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "lost_replicas:middlewares",
        }
        before = {name: os.environ.get(name) for name in (*settings, "RAY_AUTH_MODE")}
        os.environ.update(settings)
        try:
            context = ray.init(
                num_cpus=NUM_CPUS,
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                _temp_dir=folder,
            )
            yield context.address_info["gcs_address"]
        finally:
            ray.shutdown()
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})


class ServeRun:
    """`serve run CONFIG` as users start it."""

    def __init__(self, config: Path, address: str):
        self.log = config.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name("serve")), "run", str(config), "--address", address],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )

    def wait(self, *applications: str) -> None:
        """Until those are running."""
        from ray import serve

        def states() -> list[str]:
            found = serve.status().applications
            return [found[name].status.value if name in found else "MISSING" for name in applications]

        for _ in range(PATIENCE):
            now = states()
            if now == ["RUNNING"] * len(applications):
                return
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            if self.process.poll() is not None or "DEPLOY_FAILED" in now:
                break
        raise RuntimeError(f"the applications are {now}:\n{self.log.read_text()}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
