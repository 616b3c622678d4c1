"""Finds accesses to shared memory that no barrier separates.

Between two barriers of its CTA, a byte may be read by any warps, or written by one; another may only write the
same value. Checked with all warps in step, so nothing depends on an order of warps. Order within a warp is taken
for granted. TMA writes when it is issued and wgmma reads until it is waited for.
"""

from __future__ import annotations

import numpy as np

from ptx.faults import Fault

_SEVERAL = -2  # warps read a byte


class RaceCheck:
    """Who touched the bytes of a CTA's shared memory since its last barrier."""

    def __init__(self, size):
        self.epoch = 0
        self.written, self.writer = np.full(size, -1), np.full(size, -1)
        self.read, self.reader = np.full(size, -1), np.full(size, -1)
        self.pending = []  # chunks that wgmma still reads

    def barrier(self):
        self.epoch += 1

    def reads(self, places, size, t, lanes):
        for warp, touched in _by_warp(places, size, t, lanes):
            self._check(touched, self.written, self.writer, warp, "written by warp {}, read by {}")
            others = (self.read[touched] == self.epoch) & (self.reader[touched] != warp)
            self.reader[touched] = np.where(others, _SEVERAL, warp)
            self.read[touched] = self.epoch

    def writes(self, places, size, t, lanes, memory=None, words=None):
        """Stores `words`, if any: warps may write the same, as they do if a tensor has fewer parts than
        threads."""
        for warp, touched in _by_warp(places, size, t, lanes):
            if words is None:
                self._write(touched, warp)
                continue
            new = np.ascontiguousarray(words)[t.tid[lanes] // 32 == warp].view(np.uint8).reshape(-1)
            self._write(touched, warp, memory[touched] != new)
            memory[touched] = new

    def _write(self, touched, warp, is_new=True):
        self._check(touched, self.read, self.reader, warp, "read by warp {}, overwritten by {}")
        self._check(touched, self.written, self.writer, warp, "written by warps {} and {}", is_new)
        for chunks in self.pending:
            if np.isin(touched // 16, chunks).any():
                raise Fault(
                    "race: shared memory is overwritten before the wgmma that reads it is waited for"
                )
        self.written[touched], self.writer[touched] = self.epoch, warp

    def copy_begins(self, chunks, warp):
        """TMA to 16-byte chunks, issued by a warp. Who waits for it is synchronized with it."""
        touched = (chunks[:, None] * 16 + np.arange(16)).reshape(-1)
        self._write(touched, warp)
        self.written[touched] = -1

    def wgmma_begins(self, chunks):
        self.pending.append(chunks)

    def wgmma_ends(self, chunks):
        self.pending = [other for other in self.pending if other is not chunks]
        touched = (chunks.reshape(-1, 1) * 16 + np.arange(16)).reshape(-1)
        self.read[touched], self.reader[touched] = self.epoch, _SEVERAL

    def _check(self, touched, when, who, warp, told, is_new=True):
        bad = (when[touched] == self.epoch) & (who[touched] != warp) & is_new
        if bad.any():
            place = int(touched[bad][0])
            other = "several" if who[place] == _SEVERAL else who[place]
            raise Fault(
                f"race: byte {place} of shared memory is {told.format(other, warp)}, no barrier between"
            )


def _by_warp(places, size, t, lanes):
    warps = t.tid[lanes] // 32
    for warp in np.unique(warps).tolist():
        yield warp, (places[warps == warp][:, None] + np.arange(size)).reshape(-1)
