"""The life of a run: one folder, any number of sittings that are cut short, and a last one that must end well."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.studies.attacks.sittings import TINY, Sitting, in_a_child

FILES = {
    "settings.json",
    "train.log",
    "metrics.jsonl",
    "summary.json",
    "report.html",
    "model.pgolf",
    "checkpoint.pt",
    "checkpoint.previous.pt",
}


class Lost(Exception):
    """What went wrong in a life: (outcome, what)."""


class Life:
    """`folder` is the one in which all sittings are started."""

    def __init__(self, folder: Path, **environ: str):
        self.folder, self.environ = folder, {**TINY, **environ}
        self.run = folder / "runs" / self.environ["RUN_ID"]
        self.every_metric = True  # must be there in the end
        folder.mkdir(parents=True, exist_ok=True)

    def going_on(self) -> dict[str, str]:
        """The settings with which a user starts the run again: gone on with where that is possible."""
        if any((self.run / name).exists() for name in ("checkpoint.pt", "checkpoint.previous.pt")):
            return {**self.environ, "RESUME": str(self.run)}
        return self.environ

    def train(self, environ: dict[str, str] | None = None, **options) -> Sitting:
        return Sitting(self.folder, "train_gpt.py", [], {**self.going_on(), **(environ or {})}, **options)

    def problem(self, whole: bool = False) -> str:
        """What is wrong with what lies on the disk; `whole` after a sitting that ended well."""
        return in_a_child(lambda: next(_problems(self, whole), ""))

    def end_well(self, usual: "Usual", after: str) -> None:
        """Sittings that nobody disturbs must end with what an undisturbed run gives."""
        try:
            usual.sit(self)
        except TimeoutError:
            raise Lost("hang", f"after {after}") from None
        except AssertionError as error:
            raise Lost("lost run", f"after {after}: {error}") from None
        problem = self.problem(whole=True)
        if not problem and (self.run / "model.pgolf").read_bytes() != usual.artifact:
            problem = "another artifact than that of an undisturbed run"
        if problem:
            raise Lost("lost run", f"after {after}: {problem}")
        self.forget()

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # where a disk is mounted it stays, empty
        for left in self.folder.parent.glob(f"{self.folder.name}.*"):
            left.unlink()


class Usual:
    """An undisturbed life: its artifact, and how long its phases take at most. `start` gives one life's sittings, each
    a list of processes."""

    def __init__(self, folder: Path, start: Callable[[Life], Iterator[list[Sitting]]]):
        self.start, self.seconds = start, {"end": 0.01}
        life = Life(folder / "usual")
        for sitting in self.sit(life):
            for (phase, begin), (_, end) in zip(sitting.seen, sitting.seen[1:], strict=False):
                self.seconds[phase] = max(end - begin, self.seconds.get(phase, 0.0))
        problem = life.problem(whole=True)
        assert not problem, problem
        self.artifact = (life.run / "model.pgolf").read_bytes()
        life.forget()

    def sit(self, life: Life) -> list[Sitting]:
        """The sittings of first ranks, all ended with status 0."""
        done = []
        for sittings in self.start(life):
            for sitting in sittings:
                status = sitting.end()
                assert not status, f"status {status}: {sitting.last_line()}"
            done.append(sittings[0])
        return done


def attempts(lead: Callable[[int], Iterator[str]], seed: int) -> None:
    """What a process that `watch` watches does: one life after another, told by the phases that were hit. An empty one
    is a sign of life."""
    while True:
        print(seed, flush=True)
        try:
            for phase in lead(seed):
                print(seed, *(["valid", phase] if phase else []), flush=True)
        except Lost as lost:
            outcome, what = lost.args
            print(seed, outcome.replace(" ", "_"), what.replace("\n", " "), flush=True)
        seed += 1


def _problems(life: Life, whole: bool) -> Iterator[str]:
    from pgolf.artifact import read_artifact
    from pgolf.data.prepare import prepared_facts
    from pgolf.data.shards import find_shards, read_shard
    from pgolf.data.tokenizer import Tokenizer
    from pgolf.run.saved_settings import read_settings
    from pgolf.training import checkpoint

    readers: dict[str, Callable[[Path], object]] = {
        "settings.json": read_settings,
        "train.log": _whole_lines,
        "metrics.jsonl": lambda path: [json.loads(line) for line in _whole_lines(path)],
        "summary.json": lambda path: json.loads(path.read_text(encoding="utf-8")),
        "report.html": _whole_page,
        "model.pgolf": read_artifact,
        "checkpoint.pt": checkpoint.load,
        "checkpoint.previous.pt": checkpoint.load,
    }
    folder, run = life.folder, life.run
    there = {path.name for path in run.iterdir()} if run.is_dir() else set()
    for name in sorted(there):
        if name in readers:
            try:
                readers[name](run / name)
            except Exception as error:
                yield f"{name}: {error!r}"
        elif whole or not (name.startswith(".") and name.endswith(".tmp")):
            yield f"{name} was left"
    for data in (folder / "mine", *folder.glob("data/datasets/*")):
        if not prepared_facts(data):
            if data.name == "mine" and data.exists():
                yield "mine: a folder of shards that is not whole"
            continue
        for shard in [*find_shards(data, "train"), *find_shards(data, "val")]:
            read_shard(shard)
    for model in (*folder.glob("data/tokenizers/*.model"), *folder.glob("mine/*.model")):
        Tokenizer(model)
    if whole:
        lacking = FILES - there - {"checkpoint.previous.pt"}
        if lacking:
            yield f"{', '.join(sorted(lacking))}: not there"
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        if summary["interrupted"] or summary["val_bpb_quantized"] is None:
            yield "summary.json: not that of a whole run"
        steps = [row["step"] for row in map(json.loads, _whole_lines(run / "metrics.jsonl")) if row["kind"] == "train"]
        if life.every_metric and (set(steps) != set(range(1, summary["steps"] + 1)) or steps.count(1) > 1):
            yield "metrics.jsonl: its steps are not those of one run"
        for left in (*folder.glob("**/.*.tmp"), *folder.glob("**/.*pgolf-making*")):
            yield f"{left.name} was left"


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        raise ValueError("ends within a line")
    return text.splitlines()


def _whole_page(path: Path) -> None:
    if not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise ValueError("ends within the page")
