"""Run glowq's command in processes of their own, and kill or interrupt it at a chosen moment.

`Server` starts `python -m support.disturbed`, which imports everything once and then forks a process for each command.
It computes nothing itself, so that a forked process has no locks of threads that do not exist in it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.scandir"}
LONGEST = 120.0  # seconds of a command; a longer one hangs


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status, or minus the number of the signal that ended it.
        operations: number of its file operations in the watched folder.
        seconds: time from its start to the last of them.
        stdout, stderr: what it printed.
    """

    status: int
    operations: int
    seconds: float
    stdout: str
    stderr: str


class Server:
    """A process that runs commands; use it as a context manager.

    Args:
        logs: a folder for what the commands print.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs

    def __enter__(self) -> Server:
        command = [sys.executable, "-m", "support.disturbed", os.fspath(self.logs)]
        paths = os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parents[1])])
        settings = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=settings, text=True, cwd=self.logs
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def run(
        self, words: Sequence[Any], root: Path, sent: int = 0, *, operation: int = 0, seconds: float = 0.0
    ) -> Ended:
        """Run `glowq` with these words, and send it a signal.

        Args:
            words: the arguments of the command.
            root: the folder whose file operations are counted.
            sent: number of the signal; 0 lets the command end by itself.
            operation: the file operation before which the signal is sent; 0 for none.
            seconds: time after which it is sent; 0 for never.
        """
        typed = [str(word) for word in words]
        request = {"typed": typed, "root": str(root), "sent": sent, "operation": operation, "seconds": seconds}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        printed = {name: (self.logs / name).read_text() for name in ("stdout", "stderr")}
        assert answer["status"] is not None, f"{typed} hangs: {printed['stderr']}"
        return Ended(**answer, **printed)


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _serve(logs: Path) -> None:
    import peft  # noqa: F401 - imported before the fork, to save seconds in each command
    import transformers.models.llama.modeling_llama  # noqa: F401

    import glowq.cli.app
    import glowq.integrations.export.registry
    import glowq.integrations.transformers.checkpoint
    import glowq.pipeline.compare.comparison  # noqa: F401

    for line in sys.stdin:
        shared = mmap.mmap(-1, 16)
        child = os.fork()
        if child == 0:
            _command(logs, shared, **json.loads(line))
        status = _wait(child)
        operations, seconds = struct.unpack("qd", shared[:])
        print(json.dumps({"status": status, "operations": operations, "seconds": seconds}), flush=True)


def _wait(child: int) -> int | None:
    """The exit status of a process; None if it had to be killed because it did not end."""
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)  # polled, because waitpid has no limit of time
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _command(
    logs: Path, shared: mmap.mmap, typed: list[str], root: str, sent: int, operation: int, seconds: float
) -> None:
    from glowq.cli.entry import main

    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(logs / stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    start, count = time.monotonic(), 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in WATCHED and any(str(part).startswith(root) for part in arguments[:2]):
            count += 1
            shared[:] = struct.pack("qd", count, time.monotonic() - start)
            if sent and count == operation:
                os.kill(os.getpid(), sent)

    sys.addaudithook(watch)
    if seconds:
        # Without a handler, the alarm ends the process at once, as SIGKILL does.
        signal.signal(signal.SIGALRM, signal.default_int_handler if sent == signal.SIGINT else signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    sys.argv = ["glowq", *typed]
    try:
        main()
    except SystemExit as ending:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ending.code if isinstance(ending.code, int) else 1 if ending.code else 0)
    os._exit(70)  # main always ends with SystemExit


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
