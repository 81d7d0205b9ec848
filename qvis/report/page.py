# SPDX-License-Identifier: GPL-2.0-or-later
"""What all pages share: markup that cannot be broken into, numbers, tables, the frame.

Names in a trace come from guests. So text and markup are different types:
:func:`h` escapes every string that is not :class:`Html`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib.resources import files

from ..trace.model import Clock
from ..trace.store import Provenance

__all__ = [
    "MODELLED",
    "NESTED",
    "Html",
    "duration",
    "figure",
    "h",
    "join",
    "modelled",
    "nested",
    "number",
    "page",
    "share",
    "table",
    "tcg",
    "whose_time",
]

UNITS = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))


NESTED = (
    "The guest ran under a real KVM, in a host that was itself emulated: exits are KVM's and "
    "counts of them hold. A clock of instructions counts those that the emulated host and the "
    "guest execute; nothing here says how long anything takes on hardware."
)
MODELLED = (
    "Nothing was measured: the machine is emulated. Counts are of the exits that KVM would have; "
    "times are modelled, by a table of costs."
)


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def h(tag: str, *children: str | None, **attributes: str | None) -> Html:
    """An element. ``class_`` means class, ``_`` within a name a hyphen; None is left out."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def join(parts: Iterable[str | None], between: str = "") -> Html:
    """Parts in a row, each escaped unless it is markup."""
    kept = [part if isinstance(part, Html) else html.escape(part) for part in parts if part]
    return Html(between.join(kept))


def page(title: str, *body: str) -> str:
    """A whole document. Nothing in it is loaded from elsewhere."""
    style = Html(files(__package__).joinpath("style.css").read_text())
    head = (
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        h("title", title),
        h("style", style),
    )
    return (
        f"<!doctype html>\n{h('html', h('head', *head), h('body', h('main', *body)), lang='en')}\n"
    )


def figure(title: str, drawing: str, caption: str | None, source: str) -> Html:
    """A figure under its title, with what it shows and where its numbers come from."""
    legend = h("figcaption", h("p", caption) if caption else None, h("p", source, class_="source"))
    return h("section", h("h2", title), h("figure", drawing, legend))


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, text: int, class_: str | None = None
) -> Html:
    """A table whose first ``text`` columns are words and whose others are numbers."""

    def line(tag: str, cells: Sequence[str]) -> Html:
        return h(
            "tr", *(h(tag, cell, class_=None if i < text else "n") for i, cell in enumerate(cells))
        )

    body = h("tbody", *(line("td", row) for row in rows))
    whole = h("table", h("thead", line("th", head)), body, class_=class_)
    return h("div", whole, class_="scroll", tabindex="0")


def number(value: float) -> str:
    """With thousands separators, and no more than four digits that count: 1,234  123.4  1.23."""
    if value == int(value):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    places = 2 if abs(value) >= 1 else 3
    text = f"{value:.1f}" if abs(value) >= 10 else f"{value:.{places}f}"
    return text if float(text) else f"{value:.2g}"


def share(value: float) -> str:
    """A share of 1 in percent."""
    if 0 < value < 0.001:
        return "<0.1%"
    return f"{100 * value:.1f}%"


def duration(ns: float) -> str:
    """A time in the unit that suits it: "1.20 ms"."""
    size, unit = next(((s, u) for s, u in UNITS if abs(ns) >= s), UNITS[-1])
    return f"{number(ns / size)} {unit}"


def modelled(provenance: Provenance) -> bool:
    """Whether nothing was measured at all: its times are made of a table of costs."""
    return provenance.clock is Clock.MODELLED


def nested(provenance: Provenance) -> bool:
    """Whether KVM ran in an emulated host: its exits are real, its times are the emulator's."""
    return bool(provenance.host_linux)


def whose_time(provenance: Provenance) -> str:
    """Whose time a trace's is, to stand before "time" or "nanoseconds"."""
    if modelled(provenance):
        return "modelled"
    return "the emulated host's" if nested(provenance) else "the host's"


def tcg(provenance: Provenance) -> bool:
    """Whether a machine without hardware support ran the guest: its times mean nothing."""
    return "tcg" in (provenance.backend, provenance.accelerator.split(",")[0])
