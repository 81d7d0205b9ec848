# SPDX-License-Identifier: GPL-2.0-or-later
"""Running the fuzzer: on the inputs that are known, on many new ones, and to keep the best."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvis.build import FuzzBuild
from qvis.errors import LostMachineError
from qvis.paths import cache_dir
from qvis.process import run

from .seeds import seeds

__all__ = ["TARGETS", "Fuzzer", "Outcome", "Target", "minimize"]

CORPUS = Path(__file__).with_name("corpus")
MAX_LENGTH = 512  # bytes of an input; each command of ours is eight
# Seconds. The slowest that was seen takes three, on a processor of its own: disk data that goes
# into registers, four bytes at a time.
INPUT_DEADLINE = 120
MEMORY = 4096  # MiB
REPORT_LINES = 40
STATISTICS = re.compile(r"#\d+\t|stat::|COVERAGE:|\s*(UN)?COVERED_|\s*NEW_FUNC")
RUN_DEADLINE = 24 * 3600.0  # seconds

# UBSan goes on after an error unless told otherwise. Leaks are looked for by walking all
# memory, after almost every input: that would take ten times as long as the rest.
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}


@dataclass(frozen=True)
class Target:
    """One of the fuzzer's ways to configure a machine and to read inputs."""

    name: str
    language: str  # of its inputs: a folder of the corpus
    share: int  # of a run's inputs, in percent


TARGETS = (
    Target("virtio-mmio-vis-fuzz", "mmio", 30),  # storage for more than 1024 vectors
    Target("virtio-mmio-vis-cached-fuzz", "mmio", 15),  # entries are cached
    Target("virtio-mmio-vis-notifiers-fuzz", "mmio", 10),  # interrupts go by guest notifiers
    Target("virtio-mmio-vis-race-fuzz", "mmio", 10),  # a thread changes the storage meanwhile
    Target("virtio-mmio-msi-fuzz", "mmio", 15),
    Target("virtio-mmio-msi-notifiers-fuzz", "mmio", 5),
    Target("generic-fuzz-virtio-mmio-blk-vis", "generic", 5),
    Target("generic-fuzz-virtio-mmio-blk-vis-cached", "generic", 3),
    Target("generic-fuzz-virtio-mmio-blk-msi", "generic", 4),
    Target("generic-fuzz-virtio-mmio-net-vis", "generic", 3),
)


@dataclass(frozen=True)
class Outcome:
    """A run that found nothing wrong."""

    target: str
    inputs: int  # that were executed
    seconds: float
    edges: int  # of QEMU's devices that some input took
    functions: frozenset[str]  # of virtio-mmio and interrupt storage that some input called
    missed: frozenset[str]  # the others; what the compiler has inlined is in neither


class Fuzzer:
    """Runs the targets of a build; what they find and print is kept in ``folder``."""

    def __init__(self, build: FuzzBuild, folder: Path | None = None) -> None:
        self.build = build
        self.folder = folder or cache_dir() / "fuzz" / build.key
        self.folder.mkdir(parents=True, exist_ok=True)

    def corpus(self, target: Target) -> Path:
        """Where inputs go that a run of this target has found to be new."""
        path = self.folder / "corpus" / target.name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def run(
        self,
        target: Target,
        inputs: int,
        *,
        seed: int = 0,
        keep: bool = True,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> Outcome:
        """Execute what is known, and mutations of it until there were so many ``inputs``.

        New ones are kept for the next run, unless told otherwise; ``seed`` is that of the
        mutations, 0 for another one each time; ``on_progress`` is told how many there were
        so far. Raises :class:`LostMachineError` with the sanitizer's words when an input ends
        QEMU, or takes it too long; the input is then in the folder.
        """
        log = self.folder / f"{target.name}.log"
        log.unlink(missing_ok=True)

        def follow(line: str) -> None:
            if match := re.match(r"#(\d+)\t", line):
                on_progress(int(match[1]))

        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            new = self.corpus(target) if keep else Path(scratch) / "new"
            new.mkdir(exist_ok=True)
            known = [CORPUS / target.language, write_seeds(target.language, Path(scratch))]
            self._call(
                target,
                [f"-runs={inputs}", f"-seed={seed}", "-print_coverage=1", "-print_final_stats=1",
                 new, *known],
                log, follow=follow,
            )  # fmt: skip
        return _outcome(target.name, log.read_text(errors="replace"), time.monotonic() - started)

    def replay(self, target: Target, files: Sequence[Path]) -> None:
        """Execute these inputs, each once, and print what QEMU does of itself to the log."""
        self._call(target, files, self.folder / f"{target.name}.replay.log", quiet=False)

    def merge(self, target: Target, into: Path, sources: Iterable[Path]) -> None:
        """Copy the fewest inputs of ``sources`` to ``into`` that take the same edges."""
        log = self.folder / f"{target.name}.merge.log"
        self._call(target, ["-set_cover_merge=1", "-use_counters=0", into, *sources], log)

    def _call(
        self,
        target: Target,
        words: Sequence[str | Path],
        log: Path,
        *,
        quiet: bool = True,
        follow: Callable[[str], None] | None = None,
    ) -> None:
        try:
            run(
                [self.build.binary, f"--fuzz-target={target.name}", f"-max_len={MAX_LENGTH}",
                 f"-timeout={INPUT_DEADLINE}", f"-rss_limit_mb={MEMORY}",
                 # What QEMU itself says of bad inputs; sanitizers and libFuzzer are heard.
                 *(["-close_fd_mask=3"] if quiet else []),
                 f"-artifact_prefix={self.folder}/{target.name}-", *words],
                stage=f"fuzz {target.name}",
                log=log,
                deadline=RUN_DEADLINE,
                cwd=self.folder,
                env=ENVIRONMENT,
                on_line=follow,
                error=LostMachineError,
            )  # fmt: skip
        except LostMachineError as problem:
            # The last that is printed, and printed always, are thousands of lines of coverage.
            lines = log.read_text(errors="replace").splitlines()
            problem.tail = [line for line in lines if not STATISTICS.match(line)][-REPORT_LINES:]
            raise


def write_seeds(language: str, folder: Path) -> Path:
    """The seeds as files in a folder of their own."""
    place = folder / "seeds"
    place.mkdir(exist_ok=True)
    for name, data in seeds(language).items():
        (place / name).write_bytes(data)
    return place


def minimize(fuzzer: Fuzzer, targets: Iterable[Target]) -> None:
    """Add to the corpus of the checkout what runs have found, and leave out what is not needed."""
    for language in sorted({target.language for target in targets}):
        with tempfile.TemporaryDirectory() as scratch:
            # Inputs that do no more than the seeds are not needed, as these are always there.
            kept = write_seeds(language, Path(scratch))
            for target in targets:
                if target.language == language:
                    fuzzer.merge(target, kept, [CORPUS / language, fuzzer.corpus(target)])
            place = CORPUS / language
            shutil.rmtree(place)
            place.mkdir()
            for file in sorted(kept.iterdir()):
                if file.name not in seeds(language):
                    shutil.copy(file, place / file.name[:12])


def _outcome(target: str, log: str, seconds: float) -> Outcome:
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", log)
    edges = 0
    for match in re.finditer(r"^#\d+\t.*\bcov: (\d+)", log, re.MULTILINE):
        edges = int(match[1])
    functions: dict[str, set[str]] = {"": set(), "UN": set()}
    for match in re.finditer(
        r"^(UN|)COVERED_FUNC: .* (\S+) \S*/virtio-(?:mmio|vis)\.c:\d+$", log, re.MULTILINE
    ):
        functions[match[1]].add(match[2])
    return Outcome(
        target,
        int(executed[1]) if executed else 0,
        seconds,
        edges,
        frozenset(functions[""]),
        frozenset(functions["UN"]),
    )
