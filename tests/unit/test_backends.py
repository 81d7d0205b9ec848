# SPDX-License-Identifier: GPL-2.0-or-later
"""Which backend is taken, and what each refuses before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest

import qvis
from qvis import Apic, InfraError, Irqchip, Platform, UsageError, backends
from qvis.backends import Probe
from qvis.backends.emulated import Emulated
from qvis.backends.kvm import Kvm
from qvis.backends.nested import Nested
from qvis.backends.qemu import QemuBackend
from qvis.backends.tcg import Tcg
from qvis.spec import MachineSpec


def test_auto_ends_at_the_emulated_machine_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_to_build_with(self: Tcg) -> Probe:
        raise InfraError("packages are missing; install them with: apt-get install gcc")

    monkeypatch.setattr(Kvm, "probe", lambda self: Probe(False, "no /dev/kvm"))
    monkeypatch.setattr(Tcg, "probe", nothing_to_build_with)
    choice = backends.choose("auto")
    assert isinstance(choice.backend, Emulated)
    assert "not kvm: no /dev/kvm; not tcg: packages are missing" in choice.reason
    assert "emulated: needs nothing of the host" in choice.reason


def test_a_patch_that_does_not_apply_is_no_reason_to_emulate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: Tcg) -> Probe:
        raise qvis.BuildError("0003-x.patch does not apply")

    monkeypatch.setattr(Kvm, "probe", lambda self: Probe(False, "no /dev/kvm"))
    monkeypatch.setattr(Tcg, "probe", broken)
    with pytest.raises(qvis.BuildError):
        backends.choose("auto")


def test_a_specification_keeps_its_platform() -> None:
    platform = Platform(Irqchip.OFF, Apic.XAPIC, apicv=True, pv_eoi=True)
    spec = MachineSpec("m", platform=platform, costs="/costs.toml")
    assert MachineSpec.from_json(spec.to_json()) == spec
    assert MachineSpec.from_json(MachineSpec("m").to_json()).platform is None


@pytest.mark.parametrize("backend", [Tcg(), Kvm(), Nested()])
@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"platform": Platform(apicv=True)}, "--apicv"),
        ({"costs": "/costs.toml"}, "--costs is for --backend emulated"),
        ({"smp": 256}, "--smp must be at most 255 in QEMU's microvm, not 256"),
    ],
)
def test_qemu_refuses_what_only_a_model_can_do(
    backend: QemuBackend, what: dict[str, object], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        backend.check(MachineSpec("m", **what))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", [Kvm(), Nested()])
def test_kvm_refuses_local_apics_in_user_space(backend: QemuBackend) -> None:
    platform = Platform(Irqchip.OFF, Apic.XAPIC)
    with pytest.raises(UsageError, match="--irqchip off is for --backend emulated"):
        backend.check(MachineSpec("m", platform=platform))


@pytest.mark.parametrize(
    ("platform", "accel", "cpu"),
    [
        (None, "kvm", "host"),
        (Platform(), "kvm,kernel-irqchip=split", "host,x2apic=on"),
        (
            Platform(Irqchip.ON, Apic.XAPIC, pv_eoi=False),
            "kvm,kernel-irqchip=on", "host,x2apic=off,kvm-pv-eoi=off",
        ),
    ],
)  # fmt: skip
def test_what_qemu_is_told_of_interrupt_hardware(
    platform: Platform | None, accel: str, cpu: str
) -> None:
    accelerator = Nested().accelerator(MachineSpec("m", platform=platform))
    assert (accelerator.accel, accelerator.cpu) == (accel, cpu)


def test_only_kvm_on_this_very_machine_cannot_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvis.backends.nested._available", lambda: 4096)
    with pytest.raises(UsageError, match="or --backend nested"):
        Kvm().check(MachineSpec("m", icount=True))
    Nested().check(MachineSpec("m", icount=True))


def test_auto_never_takes_the_inner_host() -> None:
    assert "nested" not in backends.PREFERENCE


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"icount": True}, "no instructions to count"),
        ({"smp": 256, "platform": Platform(apic=Apic.XAPIC)}, "an xAPIC has 8 bits for an ID"),
        ({"platform": Platform(Irqchip.OFF)}, "takes a local APIC in KVM"),
        (
            {"platform": Platform(Irqchip.ON), "transport": qvis.Transport.INTX},
            "QEMU's second IOAPIC, which KVM tells of no EOI",
        ),
        ({"memory": 4096}, "16 to 3072 MiB"),
        ({"costs": "/nowhere/costs.toml"}, "costs.toml"),
    ],
)
def test_what_an_emulated_machine_refuses(what: dict[str, object], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Emulated().check(MachineSpec("m", **what))  # type: ignore[arg-type]


def test_switches_choose_the_backend_that_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    with qvis.up(platform=Platform(apicv=True), smp=1) as vm:
        assert vm.info["provenance"]["backend"] == "emulated"
        assert "APICv" in vm.info["provenance"]["accelerator"]


def test_a_boot_is_recorded_by_tcg_only(tmp_path: Path) -> None:
    from qvis.trace.record import record_boot

    with pytest.raises(UsageError, match="which emulated does not have: use --backend tcg"):
        record_boot(tmp_path / "t", "true", backend="emulated")
    assert not (tmp_path / "t").exists()
