// Philox4x32-10 of Salmon et al. 2011. The counter is (block, index, epoch, stream); block j yields values 4j .. 4j + 3.

#include "philox.h"

#include <algorithm>

namespace lmim {
namespace {

constexpr uint64_t kRoundA = 0xD2511F53, kRoundB = 0xCD9E8D57;
constexpr uint32_t kKeyA = 0x9E3779B9, kKeyB = 0xBB67AE85;
constexpr int kRounds = 10;

struct Words {
    uint32_t at[4];
};

inline Words block(uint64_t seed, Words counter) {
    auto [c0, c1, c2, c3] = counter.at;
    auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
        const uint64_t a = kRoundA * c0, b = kRoundB * c2;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(b);
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(a);
        k0 += kKeyA;
        k1 += kKeyB;
    }
    return {{c0, c1, c2, c3}};
}

void put(uint32_t word, int64_t& value) { value = word; }
void put(uint32_t word, float& value) { value = static_cast<float>(word >> 8) * 0x1p-24f; }

template <typename T>
void fill(uint64_t seed, const int64_t* epochs, size_t stride, const int64_t* indices, size_t samples, size_t count,
          uint32_t stream, T* values) {
    for (size_t sample = 0; sample < samples; ++sample) {
        const auto index = static_cast<uint32_t>(indices[sample]), epoch = static_cast<uint32_t>(epochs[sample * stride]);
        for (size_t first = 0; first < count; first += 4) {
            const Words words = block(seed, {{static_cast<uint32_t>(first / 4), index, epoch, stream}});
            for (size_t i = 0; i < std::min<size_t>(4, count - first); ++i) put(words.at[i], *values++);
        }
    }
}

}  // namespace

void philox(uint64_t seed, const int64_t* epochs, size_t stride, const int64_t* indices, size_t samples, size_t count,
            uint32_t stream, int64_t* values) {
    fill(seed, epochs, stride, indices, samples, count, stream, values);
}

void philox(uint64_t seed, const int64_t* epochs, size_t stride, const int64_t* indices, size_t samples, size_t count,
            uint32_t stream, float* values) {
    fill(seed, epochs, stride, indices, samples, count, stream, values);
}

}  // namespace lmim
