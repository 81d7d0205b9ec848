# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of costs: whole, with a source each; and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvis.emulated.costs import EXITS, STEPS, Costs, Handler, Reason
from qvis.errors import UsageError

TABLE = Path(__file__).parents[2] / "qvis" / "emulated" / "costs.toml"


def test_the_table_that_comes_with_qvis_has_every_exit_and_step_with_a_source() -> None:
    costs = Costs.load()
    assert set(costs.exits) == set(EXITS)
    assert set(costs.steps) == set(STEPS)
    for cost in [*costs.exits.values(), *costs.steps.values()]:
        assert cost.cycles > 0
        assert cost.source.startswith(("[", "assumed: "))


def test_every_source_that_is_cited_is_in_the_list_of_them() -> None:
    text = TABLE.read_text()
    listed = {line.split()[1] for line in text.splitlines() if line.startswith("#   [")}
    cited = {
        word
        for cost in [*Costs.load().exits.values(), *Costs.load().steps.values()]
        for word in cost.source.split()
        if word.startswith("[")
    }
    assert cited == listed


def test_user_space_costs_more_than_the_kernel_and_that_more_than_its_fast_path() -> None:
    costs = Costs.load()
    order = [Handler.FAST, Handler.KERNEL, Handler.USER]
    for reason in Reason:
        cycles = [costs.exit(reason, h) for h in order if (reason, h) in costs.exits]
        assert cycles == sorted(cycles)


def test_a_virtual_ipi_is_about_as_fast_as_what_was_measured() -> None:
    costs = Costs.load()
    ipi = costs.exit(Reason.MSR_WRITE, Handler.FAST)
    ipi += sum(map(costs.step, ("notify", "posted", "entry")))
    assert 0.75 * 3293 < ipi < 4238  # vmexit.flat's, there and back


def test_tables_with_the_same_cycles_have_the_same_identity(tmp_path: Path) -> None:
    text, ours = TABLE.read_text(), Costs.load().identity
    for name, change, same in (("a", "1.30 us", True), ("b", "cycles = 2320", False)):
        (tmp_path / name).write_text(text.replace(change, change + "1"))
        assert (Costs.load(tmp_path / name).identity == ours) is same


def test_a_table_of_ones_own_is_read(tmp_path: Path) -> None:
    text = TABLE.read_text().replace("cycles = 2320", "cycles = 7")
    (tmp_path / "mine.toml").write_text(text)
    costs = Costs.load(tmp_path / "mine.toml")
    assert costs.exit(Reason.EXTERNAL_INTERRUPT, Handler.KERNEL) == 7


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: "frequency = [", "no table of costs"),
        (lambda text: "", "is missing"),
        (lambda text: text.replace("frequency = 2000000000", "frequency = 3"), "frequency"),
        (lambda text: text.replace("[steps.line]", "[steps.lime]"), "lime"),
        (lambda text: text.replace("cycles = 2320", "cycles = -1"), "cycles"),
        (lambda text: text.replace("cycles = 2320", "cycles = 2320.5"), "cycles"),
        (lambda text: text.replace("cycles = 2320", "cycles = true"), "cycles"),
        (lambda text: text.replace("cycles = 2320", "cycles = 99999999999999"), "cycles"),
        (lambda text: text.replace("cycles = 2320", ""), "needs cycles"),
        (lambda text: text.replace("cycles = 2320", "cycles = 1\nspread = 2"), "needs cycles"),
        (lambda text: text.replace('"[Yan] 1.30 us on average"', '" "'), "source"),
        (lambda text: text + "\n[extra]\na = 1\n", "extra"),
        (lambda text: "exits = 3\n" + text.partition("[exits")[0], "exits"),
    ],
)
def test_a_bad_table_is_refused_in_one_line(tmp_path: Path, change, says: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "bad.toml"
    path.write_text(change(TABLE.read_text()))
    with pytest.raises(UsageError, match=says) as caught:
        Costs.load(path)
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Costs.load(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="cannot read"):
        Costs.load(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no table"):
        Costs.load(tmp_path / "binary.toml")
