# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver's side of split virtqueues, and the guest's pages that they lie in.

virtio 1.3, 2.7; Linux: drivers/virtio/virtio_ring.c, the ``_split`` functions.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..memory import Memory
    from ..vcpu import Vcpu

__all__ = ["INDIRECT", "NEXT", "WRITE", "Pages", "Ring", "ring_size"]

PAGE = 4096
NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = 1
MASK = 0xFFFF
FIRST = 16 << 20  # what is below is the kernel's own


class Pages:
    """Physically contiguous pages of RAM, which drivers allocate and free."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._next = min(FIRST, memory.size // 2) & -PAGE
        self._free: dict[int, list[int]] = {}

    def take(self, size: int) -> int:
        """The address of ``size`` bytes (rounded up to pages), all zero; OSError ENOMEM."""
        size = -(-size // PAGE) * PAGE
        if free := self._free.get(size):
            address = free.pop()
        else:
            address = self._next
            if address + size > self._memory.size:
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            self._next += size
        self._memory.u8[address : address + size] = bytes(size)
        return address

    def give(self, address: int, size: int) -> None:
        """Take them back."""
        self._free.setdefault(-(-size // PAGE) * PAGE, []).append(address)


def ring_size(size: int, align: int) -> tuple[int, int, int]:
    """Of a ring of ``size`` entries: where avail and used are in it, and its bytes."""
    avail = 16 * size
    used = (avail + 6 + 2 * size + align - 1) & -align
    return avail, used, used + 6 + 8 * size


class Ring:
    """One virtqueue of a driver. ``name`` is what its interrupt is called after."""

    __slots__ = (
        "_align",
        "_avail",
        "_desc",
        "_entries",
        "_event",
        "_event_at",
        "_free",
        "_indirect",
        "_kicked",
        "_mask",
        "_next_avail",
        "_pages",
        "_tokens",
        "_u16",
        "_u32",
        "_u64",
        "_used",
        "_used_index",
        "address",
        "callback",
        "index",
        "last_used",
        "name",
        "notify",
        "size",
    )

    def __init__(
        self,
        pages: Pages,
        memory: Memory,
        index: int,
        name: str,
        size: int,
        align: int,
        features: int,
        callback: Callable[[Vcpu], None] | None,
        notify: Callable[[Vcpu], None],
    ) -> None:
        self.index = index
        self.name = name
        self.size = size
        self.callback = callback
        """Called for an interrupt that found something used."""
        self.notify = notify
        """Tells the device."""
        self._pages = pages
        self._align = align
        self._u16, self._u32, self._u64 = memory.u16, memory.u32, memory.u64
        avail, used, total = ring_size(size, align)
        self.address = pages.take(total)
        self._desc = self.address >> 3
        self._avail = self.address + avail >> 1
        self._used = self.address + used >> 1
        # What interrupts look at: used ring's index and entries, and used_event.
        self._used_index = self._used + 1
        self._entries = self.address + used + 4 >> 2
        self._event_at = self._avail + 2 + size
        self._mask = size - 1
        self._indirect = bool(features & 1 << 28)
        self._event = bool(features & 1 << 29)
        self._free = list(range(size - 1, -1, -1))
        self._tokens: list[Any] = [None] * size
        self._next_avail = 0
        self._kicked = 0
        self.last_used = 0
        if callback is None:
            self._u16[self._avail] = 0 if self._event else NO_INTERRUPT

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of descriptors, avail and used ring."""
        return self.address, self._avail << 1, self._used << 1

    @property
    def room(self) -> int:
        """Descriptors that are free."""
        return len(self._free)

    def delete(self) -> None:
        """Free its pages."""
        self._pages.give(self.address, ring_size(self.size, self._align)[2])

    def add_table(self, table: int, count: int, token: Any) -> None:
        """Make the indirect table of ``count`` descriptors at ``table`` available.

        Without indirect descriptors they are copied into the ring, which needs as many free.
        """
        if not self._indirect:
            words = self._u64
            at = table >> 3
            self.add([(words[at + 2 * i], words[at + 2 * i + 1] & 0x2FFFFFFFF)
                      for i in range(count)], token)  # fmt: skip
            return
        head = self._free.pop()
        at = self._desc + 2 * head
        words, u16 = self._u64, self._u16
        words[at] = table
        words[at + 1] = count * 16 | INDIRECT << 32
        # What _make_available() does; this is where each request comes by.
        self._tokens[head] = token
        avail, now = self._avail, self._next_avail
        u16[avail + 2 + (now & self._mask)] = head
        self._next_avail = now = now + 1 & MASK
        u16[avail + 1] = now

    def add(self, buffers: Sequence[tuple[int, int]], token: Any) -> None:
        """Make a chain available: addresses, and lengths with ``WRITE << 32`` if the device's."""
        free, words = self._free, self._u64
        heads = [free.pop() for _ in buffers]
        last = len(buffers) - 1
        for i, (address, length) in enumerate(buffers):
            at = self._desc + 2 * heads[i]
            words[at] = address
            words[at + 1] = length if i == last else length | NEXT << 32 | heads[i + 1] << 48
        self._make_available(heads[0], token if last == 0 else (heads, token))

    def _make_available(self, head: int, token: Any) -> None:
        self._tokens[head] = token
        avail, now = self._avail, self._next_avail
        self._u16[avail + 2 + (now & self._mask)] = head
        self._next_avail = now = now + 1 & MASK
        self._u16[avail + 1] = now

    def kick(self, vcpu: Vcpu) -> None:
        """Tell the device what is new, if it wants to know."""
        old, new = self._kicked, self._next_avail
        self._kicked = new
        used = self._used
        if self._event:
            event = self._u16[used + 2 + 4 * self.size]
            if (new - event - 1 & MASK) < (new - old & MASK):
                self.notify(vcpu)
        elif not self._u16[used] & 1:
            self.notify(vcpu)

    def get(self) -> Any:
        """What the device has used next, as :meth:`add` was given it; None: nothing.

        ``length`` of it is in :meth:`written`. A head that is none of ours ends the queue,
        as BAD_RING() does.
        """
        last = self.last_used
        if self._u16[self._used_index] == last:
            return None
        head = self._u32[self._entries + 2 * (last & self._mask)]
        self.last_used = last + 1 & MASK
        token = self._tokens[head] if head < self.size else None
        if token is None:
            return None
        self._tokens[head] = None
        if type(token) is tuple:
            heads, token = token
            self._free.extend(reversed(heads))
        else:
            self._free.append(head)
        return token

    def drain(self, done: Callable[[Vcpu, Any], None], vcpu: Vcpu) -> None:
        """``done(vcpu, token)`` for all that is used, and want to be told of the next."""
        u16, index, tokens = self._u16, self._used_index, self._tokens
        last = self.last_used
        while True:
            while u16[index] != last:
                head = self._u32[self._entries + 2 * (last & self._mask)]
                self.last_used = last = last + 1 & MASK
                token = tokens[head] if head < self.size else None
                if token is None:
                    return  # none of ours: BAD_RING()
                tokens[head] = None
                if type(token) is tuple:
                    heads, token = token
                    self._free.extend(reversed(heads))
                else:
                    self._free.append(head)
                done(vcpu, token)
            if self._event:
                u16[self._event_at] = last
            if u16[index] == last:
                return

    @property
    def written(self) -> int:
        """Bytes that the device wrote into what :meth:`get` gave last."""
        return self._u32[self._entries + 2 * (self.last_used - 1 & self._mask) + 1]

    def listen(self) -> bool:
        """Want to be told of the next that is used; False if there is something already."""
        last = self.last_used
        if self._event:
            self._u16[self._event_at] = last
        return self._u16[self._used_index] == last

    def interrupt(self, vcpu: Vcpu, irq: int) -> bool:
        """``vring_interrupt()``: whether there was something for :attr:`callback`."""
        vcpu.enter("vring_interrupt", irq)
        callback = self.callback
        if self._u16[self._used_index] == self.last_used or callback is None:
            return False
        callback(vcpu)
        return True

    def outstanding(self) -> list[Any]:
        """What was made available and not used, when the device is gone."""
        found = [token for token in self._tokens if token is not None]
        return [token[1] if type(token) is tuple else token for token in found]
