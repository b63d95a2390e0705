"""Guard of a job: a process that ends all processes of the job when the command that started it has ended.

``python -m server.flower.guard JOB DRIVER [FOLDER]``, for a driver that is killed and can end nothing itself.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from federated.driver_watch import driver_mark, wait_for_end
from server.flower.flower_process import stop_job, without_marks

_PROJECT = Path(__file__).resolve().parents[2]


@contextmanager
def guarded(job: str, folder: Path) -> Iterator[None]:
    """Guard the processes that the block starts for ``job``.

    If this process ends inside the block, they are ended within seconds, whoever their parent is.

    Args:
        job: mark of the processes, see ``stop_job``.
        folder: temporary folder of the job, removed after its processes.
    """
    command = [sys.executable, "-m", "server.flower.guard", job, driver_mark(), str(folder)]
    # In a session of its own, so that neither Ctrl-C on the console nor its end reaches it.
    process = subprocess.Popen(
        command,
        cwd=_PROJECT,
        env=without_marks(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def guard(job: str, driver: str, folders: Iterable[str | Path]) -> None:
    """Wait for the end of a process, then end every process of ``job`` and remove its temporary ``folders``.

    Args:
        job: mark of the processes, see ``stop_job``.
        driver: mark of the process to wait for, see ``driver_mark``.
        folders: removed after the processes have ended.
    """
    wait_for_end(driver)
    stop_job(job)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    guard(sys.argv[1], sys.argv[2], sys.argv[3:])
