# SPDX-License-Identifier: GPL-2.0-or-later
"""Traces as JSON lines and CSV: nothing is lost, nothing is half there."""

from __future__ import annotations

import csv
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest

from qvis.errors import InfraError, UsageError
from qvis.trace.export import to_csv, to_jsonl
from qvis.trace.model import SCHEMA
from qvis.trace.store import Manifest, Trace

from .synthetic import events, make, provenance, store

Export = Callable[[Trace, Path], None]
EXPORTS = [pytest.param(to_jsonl, id="jsonl"), pytest.param(to_csv, id="csv")]


@pytest.mark.parametrize("transport", ["pci", "intx", "msi", "vis"])
def test_jsonl_has_every_event_and_no_null(tmp_path: Path, transport: str) -> None:
    trace = make(tmp_path / "trace", transport, parts=3)
    path = tmp_path / "out.jsonl"
    to_jsonl(trace, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [
        {name: value for name, value in row.items() if value is not None}
        for row in trace.events().collect().iter_rows(named=True)
    ]
    assert len(lines) > 5000
    assert lines == expected


def test_jsonl_keeps_all_digits_and_all_letters(tmp_path: Path) -> None:
    name = 'blk"0\\\n\u0001{}é<b>\u2028,'
    frame = events("msi", 1, kvm=False, queues=1).with_columns(
        pl.lit(2**64 - 1, pl.UInt64).alias("pc"),
        pl.lit(name).cast(SCHEMA["device"]).alias("device"),
    )
    to_jsonl(store(tmp_path / "trace", frame, provenance()), tmp_path / "out.jsonl")
    text = (tmp_path / "out.jsonl").read_bytes().decode()
    lines = [json.loads(line) for line in text.rstrip("\n").split("\n")]
    assert len(lines) == frame.height
    assert {line["device"] for line in lines} == {name}
    assert {line["pc"] for line in lines} == {2**64 - 1}


def test_csv_has_every_event(tmp_path: Path) -> None:
    trace = make(tmp_path / "trace", "intx", parts=3)
    to_csv(trace, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == SCHEMA.names()
    frame = trace.events().collect()
    assert len(rows) == frame.height
    column = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    assert column["time"] == [str(time) for time in frame["time"]]
    assert column["cause"] == [cause or "" for cause in frame["cause"]]
    assert column["kind"].count("deliver") == 1010


@pytest.mark.parametrize("export", EXPORTS)
def test_manifest_stands_beside(tmp_path: Path, export: Export) -> None:
    trace = make(tmp_path / "trace", partial=("The buffer was full.",), lost=3)
    export(trace, tmp_path / "out.txt")
    data = json.loads((tmp_path / "out.txt.manifest.json").read_text())
    assert Manifest.from_json(data) == trace.manifest


@pytest.mark.parametrize("export", EXPORTS)
def test_empty_trace(tmp_path: Path, export: Export) -> None:
    trace = make(tmp_path / "trace", interrupts=0)
    export(trace, tmp_path / "out.txt")
    assert len((tmp_path / "out.txt").read_text().splitlines()) == (export is to_csv)
    (trace.path / "events" / "000000.parquet").unlink(missing_ok=True)
    export(Trace.open(trace.path), tmp_path / "out.txt")


@pytest.mark.parametrize("export", EXPORTS)
def test_no_space_leaves_what_was_there(tmp_path: Path, export: Export) -> None:
    trace = make(tmp_path / "trace")
    path = tmp_path / "out.txt"
    path.write_text("as it was")
    with small_files(100_000), pytest.raises(InfraError, match="no space for"):
        export(trace, path)
    assert path.read_text() == "as it was"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.txt", "trace"]


@pytest.mark.parametrize("export", EXPORTS)
def test_a_place_that_cannot_be_written(tmp_path: Path, export: Export) -> None:
    trace = make(tmp_path / "trace")
    with pytest.raises(UsageError, match=r"out\.txt cannot be written: No such file"):
        export(trace, tmp_path / "missing" / "out.txt")
    with pytest.raises(UsageError, match="cannot be written: Is a directory"):
        export(trace, tmp_path / "trace")
    assert [p.name for p in tmp_path.iterdir()] == ["trace"]


@pytest.mark.parametrize("export", EXPORTS)
def test_a_damaged_trace_is_not_taken_for_a_full_disk(tmp_path: Path, export: Export) -> None:
    trace = make(tmp_path / "trace")
    (trace.path / "events" / "000001.parquet").write_bytes(b"no parquet")
    with pytest.raises(Exception, match=r"(?i)parquet") as caught:
        export(trace, tmp_path / "out.txt")
    assert not isinstance(caught.value, InfraError)
    assert [p.name for p in tmp_path.iterdir()] == ["trace"]


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes: a full disk that needs no disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
