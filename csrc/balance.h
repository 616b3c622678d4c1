// Bins of equal cost: packs that fill their capacity and take equally long.
//
// 1. How many bins: what best-fit-decreasing needs; more where some samples are too costly to fill
//    up the rest of a bin, as long as 99.5 % of the room for tokens is used. Where 16,384 samples,
//    planned on trial, cannot be spread evenly in so few, up to 97 %. No matter of the seed.
// 2. Construction by kind, for costs that follow size. Cheap tokens (text) fill any bin for the same
//    price, so what has to be spread evenly is a sample's cost above that of as many cheap tokens:
//    costly samples, largest first, into the bin with the least of it; then the cheap ones, largest
//    first, into the least loaded bin. Where a sample finds no room, construction by need: the
//    largest in room or cost first, into the bin that lacks most of what the sample has; at last
//    with swaps that make room. Where that fails too: best-fit-decreasing's bins.
// 3. Local search: bins that cost more than 1 + 1/400 times max(mean, their costliest sample) swap
//    samples with cheaper bins, one for one of about as many tokens out of the whole data set, then
//    up to two for two with some bins, until none is left, 16 rounds are over, or
//    one took away less than a twentieth of what is too much; few bins that are 1/40 above the floor
//    go on.
//
// More than 2^20 samples are planned in groups of at most so many, each like the whole, because the
// search visits samples in no order of memory: ten times the samples then take ten times as long.
//
// What is compared are integers and single IEEE operations on them, so the plan is the same on
// every machine.
#pragma once

#include <cstdint>
#include <span>

#include "planner.h"

namespace mmpack {

// costs (N,): not negative, their sum at most 2^62 and not 0.
Plan balance(const Sizes& sizes, std::span<const std::int64_t> costs, std::uint64_t seed);

}  // namespace mmpack
