# SPDX-License-Identifier: GPL-2.0-or-later
"""Traces as text that any other tool reads: lines of JSON, or CSV.

Both are streamed, so a trace may be larger than memory, and both come with the
trace's manifest beside them, since numbers mean nothing without where they
come from.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from ..errors import InfraError, UsageError
from .model import SCHEMA
from .store import MANIFEST, Trace

__all__ = ["disk_full", "to_csv", "to_jsonl", "whole_file"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def to_jsonl(trace: Trace, path: Path) -> None:
    """Write each event as a JSON object on a line of its own, in order of time.

    What an event has not is left out. Numbers are whole and reach 2**64 - 1;
    a reader that keeps numbers as doubles loses digits of addresses and pcs.
    """
    # An object of one member a column, its braces taken off: null stays null
    # and drops out when they are joined.
    members = [
        pl.when(pl.col(name).is_not_null())
        .then(pl.struct(pl.col(name)).struct.json_encode())
        .str.slice(1)
        .str.head(-1)
        for name in SCHEMA
    ]
    joined = pl.concat_str(members, separator=",", ignore_nulls=True)
    line = pl.concat_str(pl.lit("{"), joined, pl.lit("}"))
    with whole_file(path) as temporary:
        trace.events().select(line).sink_csv(temporary, include_header=False, quote_style="never")
    _write_manifest(trace, path)


def to_csv(trace: Trace, path: Path) -> None:
    """Write a header and a line for each event, in order of time.

    What an event has not is an empty field.
    """
    with whole_file(path) as temporary:
        trace.events().sink_csv(temporary)
    _write_manifest(trace, path)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write instead of ``path``; it takes its place when the block succeeds.

    So ``path`` is never half a file. :class:`InfraError` when the disk is full,
    :class:`UsageError` when there can be no such file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        temporary.touch()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {problem.strerror}") from problem
    try:
        yield temporary
        temporary.replace(path)
    except OSError as problem:
        if not disk_full(problem):
            raise
        raise InfraError(f"no space for {path}: free some, or write elsewhere") from problem
    finally:
        temporary.unlink(missing_ok=True)


def disk_full(problem: OSError) -> bool:
    """Whether that is the operating system's reason; polars has it in the words only."""
    said = re.search(r"\(os error (\d+)\)", str(problem))
    return (int(said[1]) if said else problem.errno) in FULL


def _write_manifest(trace: Trace, path: Path) -> None:
    with whole_file(path.with_name(f"{path.name}.{MANIFEST}")) as temporary:
        temporary.write_text(json.dumps(trace.manifest.to_json(), indent=1) + "\n")
