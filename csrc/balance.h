// Bins of equal cost: packs that fill their capacity and take the same time.
//
// 1. Number of bins: that of best-fit-decreasing, or more if the rest of a costly sample's bin must
//    stay empty, as long as 99.5 % of the token capacity is used. If a trial plan of 16,384 samples
//    is not even with this number, down to 97 %. Does not depend on the seed.
// 2. Construction by kind, for costs that follow size. Cheap tokens (text) fill any bin at the same
//    price, so only a sample's excess cost over the same number of cheap tokens must be balanced:
//    costly samples, largest first, go into the bin with the least excess; then cheap samples,
//    largest first, into the least filled bin. If a sample does not fit anywhere, construction by
//    need: the largest in size or cost first, into the bin that lacks most of what the sample has;
//    finally with swaps that make room. If that fails too: the bins of best-fit-decreasing.
// 3. Local search: bins that cost more than 1 + 1/400 times max(mean, their costliest sample) swap
//    samples with cheaper bins: one for one with about the same number of tokens, from the whole
//    data set, then up to two for two with some bins. Stops when no such bin is left, after 16
//    rounds, or when a round removes less than 1/20 of the excess; then only bins that are more
//    than 1/40 above the floor continue, if they are few.
//
// More than 2^20 samples are planned in similar groups of at most 2^20, because the search accesses
// memory at random; so ten times the samples take ten times as long.
//
// Comparisons are between integers and single IEEE operations on them, so the plan is the same on
// every machine.
#pragma once

#include <cstdint>
#include <span>

#include "planner.h"

namespace mmpack {

// costs (N,): not negative, with a sum from 1 to 2^62.
Plan balance(const Sizes& sizes, std::span<const std::int64_t> costs, std::uint64_t seed);

}  // namespace mmpack
