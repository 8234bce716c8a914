"""The command `ts-loop`: options in, exit code out. A module a command; without one, the loop itself.

Exit codes: 0 done; 1 a stage failed; 2 refused, and nothing was run; 128 + n stopped by signal n (130 Ctrl-C, 143
SIGTERM, 129 SIGHUP).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import click

from harness.cli import compare, dial, doctor, export, gc, init, logs, loop, plan, report, status, sweep, think_map
from harness.errors import LoopError, Stopped
from harness.files import refusal

EPILOG = """\b
Examples:
  ts-loop --iters 3                              the embedded pair, about two minutes on a CPU
  ts-loop --dry-run                              the native commands, and nothing run
  ts-loop --limit 20 --iters 1 --name smoke      does everything work? 20 questions and prompts
  ts-loop --set distill.learning_rate=1e-3       a recipe's own setting; what depends on it runs again
  ts-loop init mine --instruct PATH --thinking PATH --prompts mine.jsonl
  ts-loop --config mine/loop.yml                 your own pair, by recipes made for it and for this machine
  ts-loop --config recipes/qwen3_4b/loop.yml     the paper's pair, on one GPU

\b
Run again with the same --name and it continues where it stopped; what a change makes stale runs again, nothing else.
Exit codes: 0 done, 1 a stage failed, 2 refused before anything ran, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
Completion for your shell: eval "$(_TS_LOOP_COMPLETE=bash_source ts-loop)"   (or zsh_source, fish_source)
"""


command = click.Group(
    name="ts-loop",
    callback=loop.callback,
    params=loop.PARAMETERS,
    help=loop.HELP,
    invoke_without_command=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    commands=[
        init.command,
        doctor.command,
        plan.command,
        status.command,
        logs.command,
        report.command,
        compare.command,
        dial.command,
        sweep.command,
        export.command,
        gc.command,
        think_map.command,
    ],
)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def main() -> None:
    """Entry point: every expected failure is one or two lines on standard error and a non-zero exit."""
    if sys.platform != "linux":
        click.echo(
            "ts-loop: needs Linux (bitsandbytes, process groups that end with it); on Windows use WSL 2", err=True
        )
        sys.exit(2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
            signal.signal(number, _stop)
    code: object = 0
    said = ""
    try:
        code = command.main(standalone_mode=False)
    except LoopError as error:
        said, code = str(error), error.code
    except Stopped as stopped:
        said, code = "stopped; what is finished is kept, run the same command again to continue", stopped.code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except OSError as error:  # of a disk, where nobody knew more to say
        refused = refusal(error, Path.cwd())
        said, code = str(refused), refused.code
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: os._exit(128 + number))  # a second one: the keeper ends with us
    if said:
        with contextlib.suppress(OSError):  # the terminal may be gone
            click.echo(f"ts-loop: {said}", err=True)
    sys.exit(code if isinstance(code, int) else 0)
