# SPDX-License-Identifier: GPL-2.0-or-later
"""What is missing is named, with the command that helps."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from qvis import host
from qvis.errors import InfraError

ABSENT = host.Package("no-such-package", "nothing", lambda: False)
PRESENT = host.Package("there", "nothing", lambda: True)


def test_probes_find_what_this_host_has_and_are_quick() -> None:
    started = time.perf_counter()
    missing = host.missing_packages()
    assert time.perf_counter() - started < 0.1
    # This very test could not have been set up without them.
    assert not {"gcc", "libc6-dev", "make", "git"} & {package.name for package in missing}


def test_nothing_missing_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PACKAGES", (PRESENT,))
    monkeypatch.setattr(host, "run", lambda *a, **k: pytest.fail("ran something"))
    host.ensure_packages()


def test_unprivileged_user_is_told_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PACKAGES", (PRESENT, ABSENT))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(host, "_privileged", lambda: False)
    with pytest.raises(InfraError) as failure:
        host.ensure_packages()
    assert str(failure.value).endswith(
        "sudo apt-get install --yes --no-install-recommends no-such-package"
    )


def test_host_without_apt_is_told_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PACKAGES", (ABSENT,))
    monkeypatch.setattr(shutil, "which", lambda *a, **k: None)
    with pytest.raises(InfraError, match="no-such-package"):
        host.ensure_packages()


def test_package_that_helps_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setenv("QVIS_CACHE", str(tmp_path))
    monkeypatch.setattr(host, "PACKAGES", (ABSENT,))
    monkeypatch.setattr(host, "_privileged", lambda: True)
    monkeypatch.setattr(host, "run", lambda words, **_: ran.append(words))
    with pytest.raises(InfraError, match="installed, but not found: no-such-package"):
        host.ensure_packages()
    assert [next(w for w in words if w in ("update", "install")) for words in ran] == [
        "update",
        "install",
    ]


def test_more_packages_are_looked_at_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PACKAGES", (PRESENT,))
    assert host.missing_packages() == []
    assert host.missing_packages((ABSENT, PRESENT)) == [ABSENT]
    monkeypatch.setattr(host, "_privileged", lambda: False)
    host.ensure_packages()
    with pytest.raises(InfraError, match="no-such-package"):
        host.ensure_packages((ABSENT,))
