#include "resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd.h"

namespace lmim {
namespace {

// Catmull-Rom, as in PIL and DALI.
float cubic(float x) {
    x = std::abs(x);
    if (x < 1.0f) return (1.5f * x - 2.5f) * x * x + 1.0f;
    if (x < 2.0f) return ((-0.5f * x + 2.5f) * x - 4.0f) * x + 2.0f;
    return 0.0f;
}

float linear(float x) { return std::max(1.0f - std::abs(x), 0.0f); }

// Which input positions make each output position, along one axis.
struct Taps {
    size_t count;  // per output position
    std::vector<size_t> positions;
    std::vector<float> weights;

    Taps(size_t from, size_t to, Kernel kernel) {
        const float scale = static_cast<float>(from) / static_cast<float>(to), spread = std::max(scale, 1.0f);
        const float radius = (kernel == Kernel::CUBIC ? 2.0f : 1.0f) * spread;
        count = static_cast<size_t>(std::ceil(2.0f * radius));
        positions.resize(to * count);
        weights.resize(to * count);
        const long last = static_cast<long>(from) - 1;
        for (size_t i = 0; i < to; ++i) {
            const float centre = (static_cast<float>(i) + 0.5f) * scale - 0.5f;
            const long first = static_cast<long>(std::floor(centre - radius)) + 1;
            float total = 0.0f;
            for (size_t tap = 0; tap < count; ++tap) {
                const long position = first + static_cast<long>(tap);
                const float distance = (static_cast<float>(position) - centre) / spread;
                const float weight = kernel == Kernel::CUBIC ? cubic(distance) : linear(distance);
                positions[i * count + tap] = static_cast<size_t>(std::clamp(position, 0l, last));
                weights[i * count + tap] = weight;
                total += weight;
            }
            for (size_t tap = 0; tap < count; ++tap) weights[i * count + tap] /= total;
        }
    }
};

LMIM_SIMD void add_row(const float* from, float weight, size_t count, float* to) {
    for (size_t i = 0; i < count; ++i) to[i] += from[i] * weight;
}

using Pixel = float __attribute__((vector_size(16)));  // and one value of the next pixel

inline Pixel load(const float* at) {
    Pixel pixel;
    std::memcpy(&pixel, at, sizeof pixel);
    return pixel;
}

LMIM_SIMD void resize_row(const float* from, const Taps& taps, size_t width, float* to) {
    const size_t* position = taps.positions.data();
    const float* weight = taps.weights.data();
    for (size_t x = 0; x < width; ++x) {
        Pixel sum{};
        for (size_t tap = 0; tap < taps.count; ++tap) sum += load(from + Image::kChannels * *position++) * *weight++;
        std::memcpy(to + Image::kChannels * x, &sum, sizeof sum);  // the next pixel overwrites the fourth value
    }
}

}  // namespace

void Image::reset(size_t height, size_t width) {
    height_ = height;
    width_ = width;
    if (values_.size() < height * stride() + kSlack) values_.resize(height * stride() + kSlack);
}

void resize(const Image& from, size_t height, size_t width, Kernel kernel, Image& scratch, Image& to) {
    const Taps down(from.height(), height, kernel), across(from.width(), width, kernel);
    scratch.reset(height, from.width());
    for (size_t y = 0; y < height; ++y) {
        float* row = scratch.row(y);
        std::fill_n(row, scratch.stride(), 0.0f);
        for (size_t tap = y * down.count; tap < (y + 1) * down.count; ++tap)
            if (down.weights[tap] != 0.0f) add_row(from.row(down.positions[tap]), down.weights[tap], scratch.stride(), row);
    }
    to.reset(height, width);
    for (size_t y = 0; y < height; ++y) resize_row(scratch.row(y), across, width, to.row(y));
}

}  // namespace lmim
