"""How the two programs, `pgolf` and `train_gpt.py`, begin and end: what must be done before torch is imported, and one
line with an exit status for whatever stops them.
"""

import contextlib
import os
import sys
from collections.abc import Callable

from pgolf.errors import Interrupted, PgolfError, UserError, complain, out_of_memory
from pgolf.presets import PRESETS, default_preset

USAGE = """\
usage: python train_gpt.py [-h] [NAME=value ...]
       torchrun --standalone --nproc_per_node=8 train_gpt.py [NAME=value ...]

Train, quantise, compress, re-load and score one model; its folder is runs/<run_id>/.

NAME=value sets a setting, as the environment variable NAME does; an argument goes before a variable.
  PRESET=name   all settings of a system: {presets}
                (none given: the best one whose data is there, on a GPU; else demo)
  RESUME=folder go on with an interrupted run
`pgolf settings` lists all settings with defaults and accepted values, `pgolf presets` the systems.
"""


def before_torch() -> None:
    """Waiting threads spin this long, then sleep. By default they spin on, and on a busy CPU a step of the demo took
    3.4 s instead of 0.6 s; on an idle one this costs nothing. It is read when torch loads its threads."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def begin_training(argv: list[str]) -> None:
    """Take the arguments into the environment and refuse settings that cannot be used; ends the process for --help and
    for what is wrong. Without torch, whose import takes seconds."""
    before_torch()
    status = ending("train_gpt.py", lambda: _help() if {"-h", "--help"} & {*argv} else _take(argv))
    if status is not None:
        sys.exit(status)


def _help() -> int:
    print(USAGE.format(presets=", ".join(PRESETS)), end="")
    return 0


def _take(argv: list[str]) -> None:
    from pgolf.settings import given_settings, load_settings, settings_of_arguments

    settings_of_arguments(argv, os.environ)
    # Which preset a run takes may be known only with torch, or with the run that is gone on with: any must do.
    given = given_settings(os.environ)
    presets = [given.get("preset") or default_preset(cuda) for cuda in (True, False)]
    refused = None
    for preset in PRESETS if given.get("resume") else dict.fromkeys(presets):
        try:
            load_settings(preset=preset)
            return
        except UserError as error:
            refused = refused or error
    assert refused
    raise refused


def ending(program: str, work: Callable[[], int | None], may_be_cut: bool = False) -> int | None:
    """What `work` returns, or the exit status for what stopped it, told in one line; an output that
    `may_be_cut` is no failure where its reader has enough (`pgolf ... | head`)."""
    try:
        try:
            return work()
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except PgolfError as error:
        return complain(program, error)
    except OSError as error:
        _drop_output()
        return 0 if may_be_cut and isinstance(error, BrokenPipeError) else complain(program, error)
    except Interrupted as error:  # before or after what would tell of it
        return error.status
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError) as error:
        if words := out_of_memory(error):
            return complain(program, words)
        raise


def _drop_output() -> None:
    """What is still in the buffer of the standard output would be tried once more when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
