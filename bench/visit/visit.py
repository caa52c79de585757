"""The clock of a visit to a GPU machine: `bench/gpu.sh OUT [--seconds 540] [--parts a,b] [--wheels DIR] [--quick]`.

Every part (plan.py) is a process with a limit of its own and adds facts to OUT/*.jsonl, a line each. One of them at a
time has its turn at the device, the first in the plan that asks; the others compile meanwhile. What a part compiles
stays in .visit/ of the checkout, so that a second visit begins warm. `--parts failed` takes those that did not end well
the last time. Needs the standard library alone: packages come from --wheels, unpacked into .visit/site.

Exit status: 0 if every part ended well, 1 if not, 2 for bad arguments.
"""

import argparse
import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.visit import facts, turns, wheels
from bench.visit.plan import SECONDS, Part, chosen, has_cuda, plan

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".visit"  # ignored: compiled code, unpacked wheels, how the parts ended
AT_ONCE = 6  # processes
MEMORY_GB = 125  # of the device, for all of them
TAIL_LINES = 40  # of a failed part's output, in OUT/log.txt
GRACE_SECONDS = 3.0  # between the request to end and the end
CLOSING_SECONDS = 8.0  # of the visit, or a tenth of a short one, for ending what still runs
PR_SET_PDEATHSIG = 1


@dataclass
class Running:
    part: Part
    process: subprocess.Popen
    clock: socket.socket  # this end of the part's
    log: Path
    begun: float
    wants: bool = False
    turn_begun: float | None = None
    turn_s: float = 0.0  # in all
    killed: str = ""  # why
    kill_at: float | None = None  # when asking was not enough


class Visit:
    def __init__(
        self, out: Path, parts: list[Part], seconds: float, environ: dict[str, str], begun: float, scale: float
    ):
        self.out, self.waiting, self.seconds, self.environ, self.begun = out, list(parts), seconds, environ, begun
        self.rank = {part.name: index for index, part in enumerate(parts)}
        self.scale = scale  # of the plan's seconds
        self.running: list[Running] = []
        self.states: dict[str, str] = {}
        self.selector = selectors.DefaultSelector()

    def second(self) -> float:
        return time.time() - self.begun

    def run(self) -> None:
        """Until all parts have ended or the time is up."""
        while self.waiting or self.running:
            over = self.second() > self.seconds - min(CLOSING_SECONDS, self.seconds / 10)
            if over:
                self._give_up()
            self._begin_parts()
            self._grant()
            for key, _ in self.selector.select(timeout=0.2):
                self._heard(key.data)
            for running in list(self.running):
                self._look_at(running, over)

    def _give_up(self) -> None:
        for part in self.waiting:
            self._ended(part, "not reached")
        self.waiting.clear()

    def _begin_parts(self) -> None:
        for part in list(self.waiting):
            if len(self.running) >= AT_ONCE:
                return
            if self.second() >= part.end * self.scale:
                self.waiting.remove(part)
                self._ended(part, "not reached")
            elif self.second() >= part.start * self.scale and part.gb + self._taken_gb() <= MEMORY_GB:
                self.waiting.remove(part)
                self.running.append(self._begin(part))

    def _taken_gb(self) -> int:
        return sum(running.part.gb for running in self.running)

    def _begin(self, part: Part) -> Running:
        ours, theirs = socket.socketpair()
        log = self.out / ".logs" / f"{part.name.replace(' ', '_')}.txt"
        environ = {**self.environ, **part.environ, facts.PART: part.name, turns.SOCKET: str(theirs.fileno())}
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *part.command],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                preexec_fn=lambda: _ends_with_its_parent(part.nice),
            )
        theirs.close()
        ours.setblocking(False)
        running = Running(part, process, ours, log, time.time())
        self.selector.register(ours, selectors.EVENT_READ, running)
        print(f"{self.second():6.1f}  {part.name}", flush=True)
        return running

    def _grant(self) -> None:
        if any(running.turn_begun is not None for running in self.running):
            return
        asking = [running for running in self.running if running.wants and not running.killed]
        if asking:
            first = min(asking, key=lambda running: self.rank[running.part.name])
            first.wants, first.turn_begun = False, time.time()
            try:
                first.clock.send(turns.GO)
            except OSError:  # it has just ended
                first.turn_begun = None

    def _heard(self, running: Running) -> None:
        try:
            said = running.clock.recv(64)
        except OSError:
            said = b""
        if not said:  # closed by its end
            self.selector.unregister(running.clock)
        for letter in said:
            if letter == turns.WANT[0]:
                running.wants = True
            elif letter == turns.DONE[0]:
                self._end_turn(running)

    @staticmethod
    def _end_turn(running: Running) -> None:
        if running.turn_begun is not None:
            running.turn_s += time.time() - running.turn_begun
            running.turn_begun = None

    def _look_at(self, running: Running, over: bool) -> None:
        """End it where its time is up, and keep how it ended."""
        now, part = time.time(), running.part
        if (status := running.process.poll()) is not None:
            self._end_turn(running)
            self.running.remove(running)
            if running.clock in (key.fileobj for key in self.selector.get_map().values()):
                self.selector.unregister(running.clock)
            running.clock.close()
            _signal_group(running.process.pid, signal.SIGKILL)  # what it left running
            state = running.killed or ("ok" if status == 0 else "failed")
            self._ended(part, state, status, now - running.begun, running.turn_s, running.log)
        elif running.killed:
            if running.kill_at is not None and now > running.kill_at:
                running.kill_at = None
                _signal_group(running.process.pid, signal.SIGKILL)
        elif over or self.second() > part.end * self.scale:
            self._stop(running, "timed out")
        elif running.turn_begun is not None and now - running.turn_begun > part.turn_s:
            self._stop(running, "turn too long")

    @staticmethod
    def _stop(running: Running, why: str) -> None:
        running.killed, running.kill_at = why, time.time() + GRACE_SECONDS
        _signal_group(running.process.pid, signal.SIGTERM)

    def _ended(
        self, part: Part, state: str, status: int | None = None, seconds: float = 0.0, turn_s: float = 0.0,
        log: Path | None = None,
    ) -> None:  # fmt: skip
        self.states[part.name] = state
        fact = {"part": part.name, "fact": "ended", "state": state, "status": status, "seconds": round(seconds, 2),
                "turn_s": round(turn_s, 2), "second": round(self.second(), 2)}  # fmt: skip
        facts.append(self.out / "visit.jsonl", json.dumps(fact))
        print(
            f"{self.second():6.1f}  {part.name}: {state} after {seconds:.1f} s, {turn_s:.1f} s at the device",
            flush=True,
        )
        if log is not None:
            lines = log.read_text(errors="replace").splitlines()
            kept = lines if state != "ok" else lines[-5:]
            with (self.out / "log.txt").open("a") as file:
                file.write(f"== {part.name}: {state}\n" + "".join(f"{line}\n" for line in kept[-TAIL_LINES:]))
            if state == "failed":
                print("".join(f"        | {line[:160]}\n" for line in lines[-3:]), end="", flush=True)


def _ends_with_its_parent(nice: int) -> None:
    """In the child: a visit that is killed leaves nobody behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if nice:
        os.nice(nice)


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def environment(out: Path, begun: float, quick: bool, cuda: bool) -> dict[str, str]:
    """Of every part."""
    site = KEPT / "site"
    path = [str(ROOT), *([str(site)] if site.is_dir() else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(KEPT / "inductor"),
        "TRITON_CACHE_DIR": str(KEPT / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
        facts.FOLDER: str(out),
        facts.START: repr(begun),
        **({"PGOLF_BENCH_QUICK": "1"} if quick else {}),
        **({} if cuda or "PGOLF_BACKEND" in os.environ else {"OMP_NUM_THREADS": "1"}),
    }


def link_kernels() -> None:
    """`pgolf.triton_kernels` lies beside the package; an installation finds it there, a bare checkout by a link."""
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import importlib.util as u; import sys; sys.exit(not u.find_spec('pgolf.triton_kernels'))",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    if found.returncode:
        (ROOT / "pgolf" / "triton_kernels").symlink_to(Path("..") / "triton_kernels")


def last_states() -> dict[str, str]:
    try:
        return json.loads((KEPT / "states.json").read_text())
    except (OSError, ValueError):
        return {}


def main(arguments: list[str] | None = None) -> int:
    begun = time.time()
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the facts")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole visit, 540 by default")
    parser.add_argument("--parts", default="", help="names or beginnings of names, and `failed`; separated by commas")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what is missing here")
    parser.add_argument("--quick", action="store_true", help="prove that every part runs; measures nothing")
    options = parser.parse_args(arguments)
    cuda = has_cuda()
    if not options.seconds > 0:
        parser.error(f"--seconds {options.seconds:g}: must be above 0")
    try:
        names = [name.strip() for name in options.parts.split(",") if name.strip()]
        parts = chosen(plan(options.quick, cuda), names, last_states())
    except ValueError as error:
        parser.error(str(error))
    if not cuda and not options.quick:
        parser.error("no CUDA device here; --quick proves the script without one")
    out = options.out.resolve()
    (out / ".logs").mkdir(parents=True, exist_ok=True)
    KEPT.mkdir(exist_ok=True)
    os.environ.update({facts.FOLDER: str(out), facts.START: repr(begun), facts.PART: "visit"})
    facts.add("begun", seconds=options.seconds, quick=options.quick, cuda=cuda, parts=[part.name for part in parts])
    wheels.unpack(options.wheels, KEPT / "site")
    link_kernels()
    scale = 1.0 if options.quick else min(1.0, options.seconds / SECONDS)
    visit = Visit(out, parts, options.seconds, environment(out, begun, options.quick, cuda), begun, scale)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(visit, "seconds", 0.0))
    visit.run()
    ended = {**last_states(), **visit.states}
    (KEPT / "states.json").write_text(json.dumps(ended, indent=1) + "\n")
    shutil.rmtree(out / ".logs", ignore_errors=True)
    facts.add("over", states={name: state for name, state in visit.states.items() if state != "ok"})
    print(f"{visit.second():6.1f}  {len(facts.read(out))} facts in {out}", flush=True)
    return int(any(state != "ok" for state in visit.states.values()))


if __name__ == "__main__":
    sys.exit(main())
