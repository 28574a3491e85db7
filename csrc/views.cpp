#include "views.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "resize.h"
#include "simd.h"

namespace lmim {
namespace {

constexpr size_t kChannels = Image::kChannels;

constexpr size_t kKept = size_t{1} << 24;  // bytes of scratch that a thread keeps: for a crop of a million pixels

struct Scratch {
    Image crop, rows, resized, padded, filtered;
};

// Memory of one thread, kept from crop to crop so that it costs nothing from the system, but not after a huge crop.
class Borrowed {
public:
    ~Borrowed() {
        size_t bytes = 0;
        for (const Image* image : {&space_.crop, &space_.rows, &space_.resized, &space_.padded, &space_.filtered})
            bytes += image->capacity();
        if (bytes > kKept) space_ = Scratch();
    }
    Scratch& operator*() { return space_; }

private:
    static Scratch& mine() {
        thread_local Scratch scratch;
        return scratch;
    }
    Scratch& space_ = mine();
};

LMIM_SIMD void widen(const uint8_t* from, size_t count, float* to) {
    for (size_t i = 0; i < count; ++i) to[i] = from[i];
}

// To the nearest whole number, 0..255; what is no number becomes 0.
LMIM_SIMD void narrow(const float* from, size_t count, uint8_t* to) {
    for (size_t i = 0; i < count; ++i) {
        const float value = std::min(std::max(0.0f, from[i]), 255.0f);
        to[i] = static_cast<uint8_t>(static_cast<int>(value + 0.5f));
    }
}

LMIM_SIMD void round_values(size_t count, float* values) {
    for (size_t i = 0; i < count; ++i) {
        const float value = std::min(std::max(0.0f, values[i]), 255.0f);
        values[i] = static_cast<float>(static_cast<int>(value + 0.5f));
    }
}

void load(const Crop& crop, Image& image) {
    image.reset(crop.height, crop.width);
    widen(crop.pixels, crop.height * image.stride(), image.row(0));
}

// Index of a row or column that is `at` places from the first one, reflected about the edge pixels' centres.
size_t reflected(long at, size_t count) {
    if (count == 1) return 0;
    const long last = static_cast<long>(count) - 1;
    at = std::abs(at) % (2 * last);
    return static_cast<size_t>(at > last ? 2 * last - at : at);
}

void pad(const Image& from, size_t radius, Image& to) {
    const auto reach = static_cast<long>(radius);
    to.reset(from.height() + 2 * radius, from.width() + 2 * radius);
    for (size_t y = 0; y < to.height(); ++y) {
        const float* source = from.row(reflected(static_cast<long>(y) - reach, from.height()));
        float* row = to.row(y);
        std::memcpy(row + kChannels * radius, source, from.stride() * sizeof(float));
        for (size_t x = 0; x < radius; ++x) {
            const size_t left = reflected(static_cast<long>(x) - reach, from.width());
            const size_t right = reflected(static_cast<long>(from.width() + x), from.width());
            std::memcpy(row + kChannels * x, source + kChannels * left, kChannels * sizeof(float));
            std::memcpy(row + kChannels * (radius + from.width() + x), source + kChannels * right,
                        kChannels * sizeof(float));
        }
    }
}

constexpr size_t kTile = 64;  // values whose sums stay in registers
static_assert(kTile <= Image::kSlack, "the last tile of an image reads behind it");

// A row of the filtered image, from the padded one; `row` points to its upper left value.
LMIM_SIMD void filter_row(const float* row, size_t stride, const float* kernel, size_t side, size_t count, float* to) {
    for (size_t start = 0; start < count; start += kTile) {
        float sums[kTile] = {};
        for (size_t ky = 0; ky < side; ++ky)
            for (size_t kx = 0; kx < side; ++kx) {
                const float weight = kernel[ky * side + kx];
                const float* from = row + ky * stride + kChannels * kx + start;
                for (size_t i = 0; i < kTile; ++i) sums[i] += from[i] * weight;
            }
        std::memcpy(to + start, sums, std::min(kTile, count - start) * sizeof(float));
    }
}

const Image& filter(const Image& image, size_t side, const float* kernel, Scratch& space) {
    if (side == 1 && *kernel == 1.0f) return image;
    pad(image, side / 2, space.padded);
    space.filtered.reset(image.height(), image.width());
    for (size_t y = 0; y < image.height(); ++y)
        filter_row(space.padded.row(y), space.padded.stride(), kernel, side, image.stride(), space.filtered.row(y));
    return space.filtered;
}

using Pixel = float __attribute__((vector_size(16)));  // and one value of the next pixel

inline Pixel pixel_at(const float* at) {
    Pixel pixel;
    std::memcpy(&pixel, at, sizeof pixel);
    return pixel;
}

// Coordinates outside the image, or none, which a right map does not have, are those of its edge.
LMIM_SIMD void remap(const float* image, size_t height, size_t width, const float* map_x, const float* map_y,
                     size_t count, float* view) {
    const float right = static_cast<float>(width - 1), bottom = static_cast<float>(height - 1);
    const size_t stride = kChannels * width;
    for (size_t i = 0; i < count; ++i) {
        const float x = std::min(std::max(0.0f, map_x[i]), right), y = std::min(std::max(0.0f, map_y[i]), bottom);
        const auto column = static_cast<size_t>(static_cast<int>(x)), line = static_cast<size_t>(static_cast<int>(y));
        const float across = x - static_cast<float>(column), down = y - static_cast<float>(line);
        const float* above = image + line * stride + kChannels * column;
        const float* below = above + (line + 1 < height ? stride : 0);
        const size_t next = column + 1 < width ? kChannels : 0;
        const Pixel top = pixel_at(above) + (pixel_at(above + next) - pixel_at(above)) * across;
        const Pixel low = pixel_at(below) + (pixel_at(below + next) - pixel_at(below)) * across;
        const Pixel value = top + (low - top) * down;
        std::memcpy(view + kChannels * i, &value, sizeof value);  // the next pixel overwrites the fourth value
    }
}

}  // namespace

void make_plain_view(const Crop& crop, ViewSize size, uint8_t* view) {
    Borrowed scratch;
    Scratch& space = *scratch;
    load(crop, space.crop);
    resize(space.crop, size.height, size.width, Kernel::CUBIC, space.rows, space.resized);
    narrow(space.resized.row(0), size.height * space.resized.stride(), view);
}

void make_warped_view(const Crop& crop, const WarpProgram& program, ViewSize size, uint8_t* view) {
    Borrowed scratch;
    Scratch& space = *scratch;
    load(crop, space.crop);
    const Image* image = &space.crop;
    if (program.working.height != crop.height || program.working.width != crop.width) {
        resize(space.crop, program.working.height, program.working.width, Kernel::LINEAR, space.rows, space.resized);
        round_values(space.resized.height() * space.resized.stride(), space.resized.row(0));
        image = &space.resized;
    }
    const Image& filtered = filter(*image, program.side, program.kernel, space);
    if (&filtered == &space.filtered) round_values(filtered.height() * filtered.stride(), space.filtered.row(0));
    // The image of a view's pixels, whatever buffer is free: `padded` is not read any more.
    Image& warped = space.padded;
    warped.reset(size.height, size.width);
    remap(filtered.row(0), filtered.height(), filtered.width(), program.map_x, program.map_y, size.height * size.width,
          warped.row(0));
    narrow(warped.row(0), size.height * warped.stride(), view);
}

}  // namespace lmim
