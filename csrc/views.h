// The views of one decoded crop on a CPU: what DALI's resize, filter and remap do on a GPU. No Python in here.

#pragma once

#include <cstddef>
#include <cstdint>

namespace lmim {

// (height, width, 3) uint8, rows without gaps.
struct Crop {
    const uint8_t* pixels;
    size_t height, width;
};

struct ViewSize {
    size_t height, width;
};

// Bicubic with antialiasing, edges repeated: (height, width, 3).
void make_plain_view(const Crop& crop, ViewSize size, uint8_t* view);

// How a warped view is made.
struct WarpProgram {
    ViewSize working;              // to which the crop is shrunk first, linear with antialiasing
    size_t side;                   // of the filter, odd
    const float* kernel;           // (side, side); borders are reflected about the edge pixels' centres
    const float *map_x, *map_y;    // (height, width) where in the filtered crop each pixel looks, inside it
};
void make_warped_view(const Crop& crop, const WarpProgram& program, ViewSize size, uint8_t* view);

}  // namespace lmim
