"""Run Python programs in new processes that do not repeat the imports of torch, which take seconds.

The processes are forked from a server that has imported nothing but `PRELOADED`. Tests of what is imported at startup
need a new interpreter instead: `subprocess.run([sys.executable, ...])`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

# Neither glowq, nor what imports huggingface_hub, which reads its settings from the environment when it is imported,
# nor what starts threads, which a fork does not copy.
PRELOADED = ["torch", "torch._inductor.compile_fx", "scipy.optimize"]

_LOCK = threading.Lock()


def run_python(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Do what `subprocess.run([sys.executable, *arguments], capture_output=True, text=True, ...)` does.

    Args:
        arguments: what follows `python` on a command line: "-c" and a program, or "-m" and a module, and its arguments.
        cwd: the working directory; None for the one of this process.
        env: the whole environment; None for the one of this process.
        timeout: seconds after which the process is killed.
        check: whether a status other than 0 is an error.

    Raises:
        subprocess.TimeoutExpired: the process ran longer than `timeout`.
        subprocess.CalledProcessError: the status is not 0, and `check` is set.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        settings = (str(cwd or Path.cwd()), dict(os.environ if env is None else env), str(out), str(err))
        process = _started(words, settings)
        try:
            process.join(timeout)
            if process.is_alive():
                raise subprocess.TimeoutExpired(words, timeout)
        finally:
            process.kill()
            process.join()
        done = subprocess.CompletedProcess([sys.executable, *words], process.exitcode, out.read_text(), err.read_text())
    if check:
        done.check_returncode()
    return done


def _started(words: Sequence[str], settings: tuple[str, dict[str, str], str, str]) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    # Libraries ask the process for this name, to tell a program from a part of it.
    process = context.Process(target=_run, args=(words, *settings), name="MainProcess")
    main = sys.modules["__main__"]
    with _LOCK:
        sys.modules["__main__"] = ModuleType("__main__")  # otherwise the new process would import this one's program
        try:
            with patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
                context.set_forkserver_preload(PRELOADED)
                forkserver.ensure_running()
            process.start()
        finally:
            sys.modules["__main__"] = main
    return process


def _run(words: Sequence[str], cwd: str, env: Mapping[str, str], out: str, err: str) -> None:
    """Become the program: called in the new process."""
    for descriptor, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    multiprocessing.set_start_method(None, force=True)
    kind, program, *rest = words
    places = (sys.base_prefix, Path(sys.prefix, "lib"))  # without the paths that pytest added
    installed = [path for path in sys.path if any(Path(path).is_relative_to(place) for place in places)]
    sys.path[:] = [cwd if kind == "-m" else "", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *installed]
    if kind == "-m":
        sys.argv = [program, *rest]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        assert kind == "-c"
        sys.argv = ["-c", *rest]
        main = ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(program, "<string>", "exec"), main.__dict__)
