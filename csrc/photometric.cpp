#include "photometric.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

// Products and sums stand in the order of `_eager` in lmim_fast/ops/photometric.py: no value may fall on the other side
// of the solarize threshold here. Loops run over whole blocks of pixels without branches, so that they become vectors.

namespace lmim {
namespace {

constexpr size_t BLOCK = 256;  // pixels: what a block needs stays in the first cache
constexpr size_t LANES = 16;   // sums of gray side by side, the same ones on all instruction sets
constexpr float LUMA[3] = {0.299f, 0.587f, 0.114f};
constexpr float MOST = 255.0f;

struct Block {
    float red[BLOCK], green[BLOCK], blue[BLOCK];
};

// Not std::min and std::max: what is not a number stays none, as in torch.
inline float clamped(float value) {
    value = 0.0f > value ? 0.0f : value;
    return MOST < value ? MOST : value;
}

inline float normalised(float value) { return value * static_cast<float>(1.0 / 127.5) - 1.0f; }

inline float row(const float* matrix, float red, float green, float blue) {
    return clamped(matrix[0] * red + matrix[1] * green + matrix[2] * blue + matrix[3]);
}

inline void map(const float* matrix, Block& block) {
    float m[12];
    std::copy(matrix, matrix + 12, m);  // no store to the block can change it
    for (size_t i = 0; i < BLOCK; ++i) {
        const float red = block.red[i], green = block.green[i], blue = block.blue[i];
        block.red[i] = row(m, red, green, blue);
        block.green[i] = row(m + 4, red, green, blue);
        block.blue[i] = row(m + 8, red, green, blue);
    }
}

// The first `count` pixels of the image, black behind them: the last block of an image is computed whole, too.
inline void spread(const uint8_t* image, size_t count, Block& block) {
    uint8_t last[3 * BLOCK];
    if (count < BLOCK) {
        std::memset(last, 0, sizeof last);
        std::memcpy(last, image, 3 * count);
        image = last;
    }
    for (size_t i = 0; i < BLOCK; ++i) {
        block.red[i] = image[3 * i];
        block.green[i] = image[3 * i + 1];
        block.blue[i] = image[3 * i + 2];
    }
}

inline void load(const float* view, size_t pixels, size_t count, Block& block) {
    if (count < BLOCK) block = {};
    std::memcpy(block.red, view, count * sizeof(float));
    std::memcpy(block.green, view + pixels, count * sizeof(float));
    std::memcpy(block.blue, view + 2 * pixels, count * sizeof(float));
}

inline void store(const Block& block, size_t pixels, size_t count, float* view) {
    std::memcpy(view, block.red, count * sizeof(float));
    std::memcpy(view + pixels, block.green, count * sizeof(float));
    std::memcpy(view + 2 * pixels, block.blue, count * sizeof(float));
}

inline void normalise(Block& block) {
    for (size_t i = 0; i < BLOCK; ++i) {
        block.red[i] = normalised(block.red[i]);
        block.green[i] = normalised(block.green[i]);
        block.blue[i] = normalised(block.blue[i]);
    }
}

inline void solarize(float threshold, bool above, float* values) {
    for (size_t i = 0; i < BLOCK; ++i) values[i] = (values[i] >= threshold) == above ? MOST - values[i] : values[i];
}

inline void cover(const float* share, float border, float* values) {
    for (size_t i = 0; i < BLOCK; ++i) values[i] = (values[i] - border) * share[i] + border;
}

inline void stretch(float mean, float factor, float* values) {
    for (size_t i = 0; i < BLOCK; ++i) values[i] = clamped((values[i] - mean) * factor + mean);
}

LMIM_SIMD void plain_block(const uint8_t* image, size_t pixels, size_t count, float* view) {
    Block block;
    spread(image, count, block);
    normalise(block);
    store(block, pixels, count, view);
}

// Adds the gray of the block's pixels to `gray`.
LMIM_SIMD void block_before_contrast(const uint8_t* image, const Colors& colors, const uint8_t* coverage,
                                     size_t pixels, size_t count, float* view, double* gray) {
    Block block;
    float share[BLOCK];
    uint8_t covered[BLOCK] = {};
    std::memcpy(covered, coverage, count);
    for (size_t i = 0; i < BLOCK; ++i) share[i] = covered[i] * static_cast<float>(1.0 / 255.0);
    spread(image, count, block);
    map(colors.before, block);
    for (float* plane : {block.red, block.green, block.blue}) solarize(colors.threshold, colors.invert_above, plane);
    map(colors.after, block);
    cover(share, colors.border[0], block.red);
    cover(share, colors.border[1], block.green);
    cover(share, colors.border[2], block.blue);
    store(block, pixels, count, view);
    for (size_t i = 0; i < BLOCK; ++i)
        block.red[i] = block.red[i] * LUMA[0] + block.green[i] * LUMA[1] + block.blue[i] * LUMA[2];
    std::fill(block.red + count, block.red + BLOCK, 0.0f);
    double sums[LANES];
    std::copy(gray, gray + LANES, sums);
    for (size_t i = 0; i < BLOCK; i += LANES)
        for (size_t lane = 0; lane < LANES; ++lane) sums[lane] += block.red[i + lane];
    std::copy(sums, sums + LANES, gray);
}

LMIM_SIMD void block_from_contrast(const Colors& colors, float mean, size_t pixels, size_t count, float* view) {
    Block block;
    load(view, pixels, count, block);
    for (float* plane : {block.red, block.green, block.blue}) stretch(mean, colors.contrast, plane);
    map(colors.final, block);
    normalise(block);
    store(block, pixels, count, view);
}

}  // namespace

void plain_view(const uint8_t* image, size_t pixels, float* view) {
    for (size_t at = 0; at < pixels; at += BLOCK)
        plain_block(image + 3 * at, pixels, std::min(BLOCK, pixels - at), view + at);
}

void guidance_view(const uint8_t* image, const Colors& colors, size_t pixels, float* view) {
    double gray[LANES] = {}, sum = 0.0;
    for (size_t at = 0; at < pixels; at += BLOCK)
        block_before_contrast(image + 3 * at, colors, colors.coverage + at, pixels, std::min(BLOCK, pixels - at),
                              view + at, gray);
    for (const double lane : gray) sum += lane;
    const auto mean = static_cast<float>(sum / static_cast<double>(pixels));
    for (size_t at = 0; at < pixels; at += BLOCK)
        block_from_contrast(colors, mean, pixels, std::min(BLOCK, pixels - at), view + at);
}

LMIM_SIMD void round_to_bfloat16(const float* values, size_t count, uint16_t* rounded) {
    for (size_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        const bool number = (bits & 0x7fffffffu) <= 0x7f800000u;
        const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        rounded[i] = static_cast<uint16_t>(number ? nearest : 0x7fc0u);
    }
}

}  // namespace lmim
