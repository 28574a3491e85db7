// Counter-based random numbers: the native form of lmim_fast/ops/philox.py. No Python in here.

#pragma once

#include <cstddef>
#include <cstdint>

namespace lmim {

// Writes numbers 0 .. count - 1 of each of `samples` (index, epoch) under the key `seed`; the epochs are `stride`
// apart, 0 where all have the same one. Values: 32-bit integers, or fp32 in [0, 1) with 24 random bits.
void philox(uint64_t seed, const int64_t* epochs, size_t stride, const int64_t* indices, size_t samples, size_t count,
            uint32_t stream, int64_t* values);
void philox(uint64_t seed, const int64_t* epochs, size_t stride, const int64_t* indices, size_t samples, size_t count,
            uint32_t stream, float* values);

}  // namespace lmim
