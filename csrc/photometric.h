// Colours of both views: from bytes (pixels, 3) to normalised planes (3, pixels). No Python in here.

#pragma once

#include <cstddef>
#include <cstdint>

namespace lmim {

// The colours of one guidance view; see lmim_fast.ops.photometric.ColorProgram.
struct Colors {
    const float* before;  // (3, 4)
    float threshold;
    bool invert_above;
    const float* after;       // (3, 4)
    const uint8_t* coverage;  // (pixels,)
    const float* border;      // (3,)
    float contrast;
    const float* final;  // (3, 4)
};

// The plain view of one image.
void plain_view(const uint8_t* image, size_t pixels, float* view);

// The guidance view of one image.
void guidance_view(const uint8_t* image, const Colors& colors, size_t pixels, float* view);

// To the nearest bfloat16, ties to even; what is not a number stays none.
void round_to_bfloat16(const float* values, size_t count, uint16_t* rounded);

}  // namespace lmim
