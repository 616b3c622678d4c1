"""Offsets inside kernels: which segment is a token in?"""

import triton
import triton.language as tl


@triton.jit
def last_at_or_before(values_ptr, count, at, LOG: tl.constexpr):
    """Of `count` ascending values the last one's place that is <= `at`; -1 where there is none."""
    low = tl.zeros_like(at)
    high = low + count
    for _ in tl.static_range(LOG):
        middle = (low + high) // 2
        searching = low < high
        is_before = tl.load(values_ptr + middle, mask=searching, other=0) <= at
        low = tl.where(searching & is_before, middle + 1, low)
        high = tl.where(searching & (is_before == 0), middle, high)
    return low - 1


def search_steps(count):
    """LOG for `last_at_or_before`: enough steps for `count` values, in fours, for each number of steps is
    a kernel of its own to compile. A step too many loads nothing."""
    return max(4, -(-count.bit_length() // 4) * 4)
