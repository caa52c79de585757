"""How an attack calls a command, and what is promised of it then."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bench.studies.attacks.small_project import MODEL, SETTINGS

RUN = "runs/good"
OF_A_SITTING = tuple(f"{RUN}/{name}" for name in ("train.log", "settings.json", "summary.json", "report.html"))


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Call:
    """`words` of `pgolf`, or of the script where the first is train_gpt.py; `named` stands in the line that is said."""

    words: tuple[str, ...]
    named: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)
    status: tuple[int, ...] = (2,)
    silent: tuple[int, ...] = (0,)  # statuses with nothing on standard error
    may_change: tuple[str, ...] = ()  # patterns of files that may be new, gone or others afterwards
    leaves: tuple[str, ...] = ()  # files that must be there afterwards
    before: Callable[[], None] = nothing  # called in the process that becomes the command
    rival: str = ""  # the same command is at work, since this file is there
    as_nobody: bool = False  # where the attack is the superuser's, who may read everything
    may_lack_memory: bool = False


def train(named: str, words: tuple[str, ...] = (), program: str = "train_gpt.py", **environ: str) -> Call:
    """A run called new."""
    return Call((program, *words), named, {**SETTINGS, "RUN_ID": "new", **environ})


def resume(named: str) -> Call:
    return Call(("train_gpt.py", f"RESUME={RUN}"), named, may_change=OF_A_SITTING)


def evaluate(named: str, *words: str, target: str = RUN) -> Call:
    return Call(("eval", target, *words), named)


def evaluate_alone(named: str, target: str, *words: str) -> Call:
    """With no settings.json beside it."""
    return evaluate(named, "--data-path", "data", "--tokenizer-path", MODEL, *words, target=target)


def import_weights(named: str, path: str = "weights.pt") -> Call:
    words = ("import-checkpoint", path, "--preset", "demo", "--output", "new.pgolf")
    return Call(words, named, SETTINGS)
