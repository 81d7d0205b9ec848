# SPDX-License-Identifier: GPL-2.0-or-later
"""Interrupts by the million while masks, targets, device and host change: is one lost?

    scripts/soak [--transports vis,msi] [--interrupts N] [--seed S] [--json FILE]

Boots a guest with 4 vCPUs and two disks of 4 queues for each transport in turn, has it
run guest-kernel/soak.c, and migrates it meanwhile. Prints JSON on standard output and
what it is doing on standard error. docs/soak.md says what is counted. The same seed
makes the same decisions; when they meet an interrupt is up to the host.

Exit status: 0 nothing lost or misdirected, 1 something was, 130 interrupted, else as `qvis`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import qvis
from qvis import backends
from qvis.backends import Backend, Job, Launch, Login, Probe
from qvis.backends.qemu import DISK_SIZE
from qvis.build import Entry, cache, pack
from qvis.cli import report
from qvis.errors import GuestError, LostMachineError, QvisError, UsageError
from qvis.experiments.boot import host
from qvis.folder import INITRD
from qvis.machine.machine import Machine
from qvis.paths import guest_kernel_dir
from qvis.process import run
from qvis.progress import step
from qvis.spec import MachineSpec

VCPUS = 4
DISKS = 2
QUEUES = 4  # a disk's; virtio-blk takes no more than there are CPUs
PROGRAM = "bin/qvis-soak"
FOLDER = "/tmp/soak"
FAULTS = ("lose", "misdirect")

COMPILE_DEADLINE = 120.0  # seconds
POLL = 0.5
# Without any progress of the guest's program for so long beyond its own deadline, on a
# host that may be busy, something else is wrong.
STANDSTILL = 120.0

# A report's keys that must be zero, and what each says.
FAILURES = {
    "lost": "requests whose interrupt never came",
    "wrong_cpu": "interrupts on a CPU that was given up before they were due",
    "never_moved": "moves that were accepted and never made",
    "while_masked": "interrupts through a mask",
    "unexplained": "interrupts that nobody can have sent",
    "miscounted_epochs": "counts that do not agree with /proc/interrupts, or vectors left over",
}


@dataclass(frozen=True)
class Plan:
    """One run over one transport. ``deadline`` is in seconds, the rest are counts."""

    interrupts: int
    seed: int
    resets: int
    migrations: int
    deadline: int
    fault: str | None = None


@dataclass
class Outcome:
    """What came of a run: the guest's own counts and what was done to it from outside."""

    transport: str
    chip: str
    interrupts: int
    migrations: int
    migrations_with_masked_pending: int
    seconds: float  # of the host, from the start of the load to its end
    counts: dict[str, int]
    queues: dict[str, list[int]]  # requests and interrupts of each
    stuck: str | None
    notes: list[str] = field(default_factory=list)
    lost_vectors: list[dict[str, Any]] = field(default_factory=list)
    device_queues: list[Any] = field(default_factory=list)  # QEMU's view, of a lost interrupt
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing is lost, misdirected or without an explanation."""
        return self.stuck is None and not any(self.counts[key] for key in FAILURES)


class TwoDisks:
    """Another backend's machines with more disks and with the soak's program in the guest."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.name = inner.name
        self.slowdown = inner.slowdown

    def probe(self) -> Probe:
        """As the other backend."""
        return self._inner.probe()

    def check(self, spec: MachineSpec) -> None:
        """As the other backend."""
        self._inner.check(spec)

    def furnish(self, folder: Path, purpose: Login | Job) -> None:
        """What the other backend's guests find, and the program."""
        self._inner.furnish(folder, purpose)
        with (folder / INITRD).open("ab") as initrd:
            initrd.write(_program().read_bytes())

    def launch(
        self,
        spec: MachineSpec,
        folder: Path,
        *,
        incoming: bool = False,
        options: Sequence[str] = (),
    ) -> Launch:
        """The other backend's machine, with disks after its own."""
        launch = self._inner.launch(spec, folder, incoming=incoming, options=options)
        more: list[str] = []
        for disk in range(1, DISKS):
            more += [
                *("-blockdev", f"driver=null-co,node-name=disk{disk},size={DISK_SIZE},"
                  "read-zeroes=on"),
                *("-device", f"{spec.transport.device('blk')},drive=disk{disk},"
                  f"num-queues={spec.queues},id=blk{disk}"),
            ]  # fmt: skip
        return replace(launch, command=[*launch.command, *more])


ARCHIVE = "soak.cpio"
OPTIONS = "-static -O2 -Wall -Wextra -Werror -pthread"


def _program() -> Path:
    """An archive with the program in it, to follow a guest's others."""
    source = guest_kernel_dir() / "soak.c"
    key = cache.key(cache.compiler(), source.read_bytes(), OPTIONS)
    with cache.lock("soak"):
        if not cache.find("soak", key):
            with cache.create("soak", key) as folder:
                program = folder / "qvis-soak"
                run(
                    ["gcc", *OPTIONS.split(), "-o", program, source],
                    stage="compile the soak program",
                    log=cache.log_file("soak"),
                    deadline=COMPILE_DEADLINE,
                )
                own = pack([Entry.file(PROGRAM, program.read_bytes(), 0o755)])
                program.unlink()
                (folder / ARCHIVE).write_bytes(own)
        return cache.result("soak", key) / ARCHIVE


class Guest:
    """The machine that the guest is in at the moment, and the program in it."""

    def __init__(self, machine: Machine, plan: Plan) -> None:
        self.machine = machine
        self._plan = plan
        self._last: dict[str, Any] = {}
        self._changed = time.monotonic()

    def start(self) -> None:
        """Start the program, with nobody waiting for it: a lost interrupt would keep it."""
        plan = self._plan
        words = [FOLDER, plan.seed, plan.interrupts, plan.resets, plan.deadline]
        if plan.fault:
            words.append(plan.fault)
        self.machine.ssh.run(
            f"mkdir {FOLDER} && (/{PROGRAM} {' '.join(map(str, words))}; echo status $?) "
            f"< /dev/null > {FOLDER}/log 2>&1 &"
        )

    def look(self) -> dict[str, Any]:
        """What the program last said.

        Raises :class:`GuestError` if it has ended without a word, or says nothing new.
        """
        text = self.machine.ssh.run(
            f"cat {FOLDER}/log; cat {FOLDER}/progress 2>/dev/null", check=False
        ).stdout
        *log, last = text.splitlines() or [""]
        said: dict[str, Any] = json.loads(last) if last.startswith("{") else self._last
        if said != self._last:
            self._last, self._changed = said, time.monotonic()
        if said.get("ended"):
            return said
        if log or (last and not last.startswith("{")):
            raise GuestError(f"the soak program ended: {' '.join([*log, last])}", stage="soak")
        if time.monotonic() - self._changed > self._plan.deadline + STANDSTILL:
            raise GuestError("the soak stands still", stage="soak", tail=[json.dumps(said)[:2000]])
        return said

    def wait(self, ready: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until ``ready`` of what the program said, or until the program has ended."""
        while not ((said := self.look()) and (said["ended"] or ready(said))):
            time.sleep(POLL)
        return said

    def mark(self, name: str, there: bool) -> None:
        """Make a file that the program looks for, or take it away."""
        self.machine.ssh.run(f"{'touch' if there else 'rm -f'} {FOLDER}/{name}")

    def migrate(self) -> None:
        """Move to a new machine with everything going on."""
        self.machine = self.machine.migrate()


@contextlib.contextmanager
def _guest(transport: qvis.Transport, backend: str, plan: Plan) -> Iterator[Guest]:
    wrapped = TwoDisks(backends.choose(backend).backend)
    machine = qvis.up(backend=wrapped, transport=transport, smp=VCPUS, queues=QUEUES)
    guest = Guest(machine, plan)
    try:
        yield guest
    finally:
        guest.machine.down()


def soak(transport: qvis.Transport, backend: str, plan: Plan) -> Outcome:
    """One guest of ``transport`` through all of ``plan``; the errors of :func:`qvis.up`."""
    chance = random.Random(plan.seed)
    # Not in the first tenth, nor so late that the load waits for the migration.
    when = sorted(chance.uniform(0.1, 0.9) * plan.interrupts for _ in range(plan.migrations))
    with _guest(transport, backend, plan) as guest, step(f"soak {transport}") as shown:
        start = time.monotonic()
        guest.start()
        migrated = with_pending = 0

        def enough(wanted: float) -> Callable[[dict[str, Any]], bool]:
            def reached(said: dict[str, Any]) -> bool:
                shown.update(min(said["interrupts"], plan.interrupts), plan.interrupts)
                return bool(said["interrupts"] >= wanted)

            return reached

        for number, threshold in enumerate(when):
            said = guest.wait(enough(threshold))
            if said["ended"]:
                break
            # Every other one with a vector of each disk masked and an interrupt due.
            if held := number % 2 == 0:
                guest.mark("hold", True)
                said = guest.wait(lambda said: said["held"] == DISKS)
                if said["ended"]:
                    break
            guest.migrate()
            migrated += 1
            with_pending += held
            if held:
                guest.mark("hold", False)
        guest.mark("enough", True)
        said = guest.wait(enough(float("inf")))
        outcome = _outcome(transport, said, guest, time.monotonic() - start)
        outcome.migrations, outcome.migrations_with_masked_pending = migrated, with_pending
        return outcome


def _outcome(
    transport: qvis.Transport, said: dict[str, Any], guest: Guest, seconds: float
) -> Outcome:
    other = {"ended", "bad", "held", "interrupts", "chip", "stuck", "queues", "notes",
             "lost_vectors"}  # fmt: skip
    return Outcome(
        transport=transport,
        chip=said["chip"],
        interrupts=said["interrupts"],
        migrations=0,
        migrations_with_masked_pending=0,
        seconds=round(seconds, 1),
        counts={key: value for key, value in said.items() if key not in other},
        queues=said["queues"],
        stuck=said["stuck"],
        notes=said["notes"].splitlines(),
        lost_vectors=said["lost_vectors"],
        device_queues=_device_queues(guest.machine) if said["lost_vectors"] else [],
        provenance=guest.machine.info["provenance"],
    )


def _device_queues(machine: Machine) -> list[Any]:
    """How far QEMU is with each queue of the disks: whether it has done what was asked."""
    found: list[Any] = []
    with contextlib.suppress(UsageError, LostMachineError):
        for device in machine.qmp("x-query-virtio"):
            if device["name"] != "virtio-blk":
                continue
            for queue in range(QUEUES):
                found.append(
                    machine.qmp("x-query-virtio-queue-status", path=device["path"], queue=queue)
                )
    return found


def _say(outcome: Outcome) -> None:
    counts = outcome.counts
    print(
        f"{outcome.transport}: {outcome.interrupts:,} interrupts, {counts['masks']:,} masks, "
        f"{counts['unmasks']:,} unmasks, {counts['moves']:,} moves, {counts['resets']} resets, "
        f"{outcome.migrations} migrations in {outcome.seconds:.0f} s: "
        f"{counts['lost']} lost, {counts['wrong_cpu']} on a wrong CPU, "
        f"{counts['spurious']} spurious",
        file=sys.stderr,
    )
    for key, meaning in FAILURES.items():
        if counts[key]:
            print(f"{outcome.transport}: {key}: {counts[key]} {meaning}", file=sys.stderr)
    if outcome.stuck:
        print(f"{outcome.transport}: a change of {outcome.stuck} never returned", file=sys.stderr)
    for vector in outcome.lost_vectors:
        print(
            f"{outcome.transport}: lost: {vector['device']}, queue {vector['queue']}, "
            f"irq {vector['irq']}, for CPU {vector['target']}, request {vector['request']}, "
            f"taken so far {vector['counts']}\n{vector['state']}",
            file=sys.stderr,
        )
    for line in outcome.notes:
        print(f"{outcome.transport}: {line}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    able = [transport.value for transport in qvis.Transport if transport.vector_per_queue]
    parser = argparse.ArgumentParser(
        prog="scripts/soak", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--transports", default=",".join(able), help=f"some of {', '.join(able)}")
    parser.add_argument("--interrupts", type=int, default=1_000_000, help="on each transport")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resets", type=int, default=40, help="of disks, by their driver")
    parser.add_argument("--migrations", type=int, default=10)
    parser.add_argument("--deadline", type=int, default=20,
                        help="seconds of a running guest until an interrupt is lost")  # fmt: skip
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="not to standard output")
    parser.add_argument("--plant", choices=FAULTS, help="a fault, to see that it is found")
    args = parser.parse_args()
    args.transports = [qvis.Transport.parse(name) for name in args.transports.split(",")]
    for transport in args.transports:
        if not transport.vector_per_queue:
            raise UsageError(f"{transport} has no vector for each queue: choose of {able}")
    for name, least in (("interrupts", 1), ("resets", 0), ("migrations", 0), ("deadline", 1),
                        ("seed", 0)):  # fmt: skip
        if getattr(args, name) < least:
            raise UsageError(f"--{name} must be at least {least}")
    return args


def _main() -> int:
    args = _arguments()
    plan = Plan(args.interrupts, args.seed, args.resets, args.migrations, args.deadline,
                args.plant)  # fmt: skip
    results: dict[str, Any] = {"host": host(), "plan": asdict(plan), "transports": {}}
    passed = True
    for transport in args.transports:
        outcome = soak(transport, args.backend, plan)
        _say(outcome)
        passed &= outcome.passed
        results["transports"][transport] = {**asdict(outcome), "passed": outcome.passed}
    results["passed"] = passed
    text = json.dumps(results, indent=2)
    if args.json:
        args.json.write_text(text + "\n")
    else:
        print(text)
    return 0 if passed else 1


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    """Errors as one line, as `qvis` has them, and machines down whatever happens."""
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        return _main()
    except QvisError as problem:
        report(problem)
        return problem.exit_code
    except KeyboardInterrupt:
        print("qvis: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
