"""Binary search in offsets inside kernels, for example for a token's segment."""

import triton
import triton.language as tl


@triton.jit
def last_at_or_before(values_ptr, count, at, LOG: tl.constexpr):
    """The index of the last of `count` ascending values that is <= `at`; -1 if there is none."""
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
    """LOG for `last_at_or_before`: enough steps for `count` values, rounded up to a multiple of 4 so that few
    kernels are compiled. Extra steps load nothing."""
    return max(4, -(-count.bit_length() // 4) * 4)
