"""Functions that run the commands of glowq, in this process or in a new one."""

import json
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

from typer.testing import CliRunner

from glowq.cli.app import app
from support.fresh_process import run_python
from support.tiny import EXAMPLE

MODEL = str(EXAMPLE)


def call(*arguments):
    """Run a command in this process."""
    typed = [str(argument) for argument in arguments]
    with patch.object(sys, "argv", ["glowq", *typed]):
        return CliRunner().invoke(app, typed, prog_name="glowq")


def result_of(*arguments):
    """Run a command with --json and return the object on stdout, which holds nothing else."""
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def fresh(folder, *arguments):
    """Run a command in a new process."""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return run_python("-m", "glowq", *arguments, cwd=folder, env=settings)


def encoder(path, model):
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(MODEL, name), path)
    return path
