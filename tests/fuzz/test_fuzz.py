# SPDX-License-Identifier: GPL-2.0-or-later
"""The short form of the fuzzing: what is known, and some thousand inputs that are new."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvis.build import FuzzBuild, build_fuzz
from qvis.errors import LostMachineError

from .runner import CORPUS, TARGETS, Fuzzer, Outcome, Target
from .seeds import Commands, Op, Place, seeds

# They build, where nobody has done so before.
pytestmark = pytest.mark.timeout(3600)

INPUTS = 5000  # beyond those that are known, over all targets
SEED = 4  # the same inputs each time

# What must be reached for the rest to mean anything: storage taken, refused, lost, disabled;
# interrupts sent, masked, pending; copies refreshed by the doorbell; both ways of migration.
EXTERNAL = {
    "virtio_vis_usable",
    "virtio_vis_masked",
    "virtio_vis_entry",
    "virtio_vis_set_pending",
    "virtio_vis_set_cached",
}
STATIC = {
    "virtio_mmio_vis_enable",
    "virtio_mmio_vis_disable",
    "virtio_mmio_vis_notify",
    "virtio_mmio_vis_copy",
    "virtio_mmio_vis_update",
    "virtio_mmio_vis_lost",
    "virtio_mmio_vis_post_load",
    "virtio_mmio_msi_set_enabled",
    "virtio_mmio_msi_notify",
    "virtio_mmio_msi_poll_one",
    "virtio_mmio_msi_vector_write",
    "virtio_mmio_msi_post_load",
    "virtio_mmio_send_message",
    "virtio_mmio_set_guest_notifiers",
}


@pytest.fixture(scope="module")
def build() -> FuzzBuild:
    return build_fuzz()


@pytest.fixture(scope="module")
def fuzzer(build: FuzzBuild, tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(build, tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """What the tests of the targets leave for the one after them."""
    return {}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_target(fuzzer: Fuzzer, target: Target, outcomes: dict[str, Outcome]) -> None:
    known = len(list((CORPUS / target.language).iterdir())) + len(seeds(target.language))
    wanted = known + INPUTS * target.share // 100
    outcome = fuzzer.run(target, wanted, seed=SEED, keep=False)
    assert outcome.inputs >= wanted
    outcomes[target.name] = outcome


def test_inputs_get_to_what_they_are_for(outcomes: dict[str, Outcome]) -> None:
    if len(outcomes) < len(TARGETS):
        pytest.skip("needs the tests of all targets before it")
    reached = set[str]().union(*(one.functions for one in outcomes.values()))
    assert sorted(EXTERNAL - reached) == []
    # Of the static ones, those that the compiler has left as functions.
    missed = set[str]().union(*(one.missed for one in outcomes.values()))
    assert sorted(STATIC & missed - reached) == []


def test_sanitizers_are_there(build: FuzzBuild) -> None:
    program = build.binary.read_bytes()
    assert b"__asan_report_store8" in program
    assert b"__ubsan_handle_type_mismatch" in program


def test_trouble_is_reported(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.runner.MEMORY", 1)
    with pytest.raises(LostMachineError, match="virtio-mmio-vis-fuzz") as caught:
        # libFuzzer looks once a second: far more than that takes.
        fuzzer.run(TARGETS[0], 10_000, keep=False)
    assert any("out-of-memory" in line for line in caught.value.tail)


def test_seeds_are_what_the_targets_read() -> None:
    assert Commands(1).storage(0x10008, Place.EXTRA, 128).data == bytes.fromhex("0603800008000100")
    for data in seeds("mmio").values():
        assert len(data) % 8 == 0
        assert all(op in list(Op) for op in data[::8])
    for data in seeds("generic").values():
        assert all(part[0] in (2, 3, 7) for part in data.split(b"FUZZ")[:-1])


def test_corpus_is_small() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert 0 < len(files) < 200
    assert sum(path.stat().st_size for path in files) < 300_000


def test_corpus_and_seeds_have_no_language_without_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == {target.language for target in TARGETS}
    with pytest.raises(KeyError):
        seeds("none")


def test_replay(fuzzer: Fuzzer, tmp_path: Path) -> None:
    file = tmp_path / "input"
    file.write_bytes(seeds("mmio")["rom"])
    fuzzer.replay(TARGETS[0], [file])
    log = (fuzzer.folder / f"{TARGETS[0].name}.replay.log").read_text()
    assert f"Executed {file}" in log
