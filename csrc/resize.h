// Separable resampling of one image. No Python in here.

#pragma once

#include <cstddef>
#include <vector>

namespace lmim {

enum class Kernel { LINEAR, CUBIC };

// Rows of pixels of three interleaved values. kSlack floats behind the last one may be read, whatever they are.
class Image {
public:
    static constexpr size_t kChannels = 3, kSlack = 64;

    void reset(size_t height, size_t width);
    size_t capacity() const { return values_.capacity() * sizeof(float); }  // bytes
    size_t height() const { return height_; }
    size_t width() const { return width_; }
    size_t stride() const { return kChannels * width_; }
    float* row(size_t y) { return values_.data() + y * stride(); }
    const float* row(size_t y) const { return values_.data() + y * stride(); }

private:
    size_t height_ = 0, width_ = 0;
    std::vector<float> values_;
};

// Resamples to (height, width); what is made smaller is averaged over its whole support. Edge pixels are repeated.
// `scratch` is overwritten.
void resize(const Image& from, size_t height, size_t width, Kernel kernel, Image& scratch, Image& to);

}  // namespace lmim
