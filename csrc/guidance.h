// The program of one guidance view: the native form of lmim_fast/data/guidance/{geometry,filter,color}.py.
//
// The files have the same steps and give the same results: change them together. No Python in here.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lmim::guidance {

// lmim_fast.data.guidance.parameters.Operation and Jitter
enum Operation : int64_t {
    CONTRAST, BLUR, CROP_VERTICAL, CROP_HORIZONTAL, SHARPEN, ROTATE, PIECEWISE_AFFINE, PERSPECTIVE, SOLARIZE, GRAYSCALE
};
enum Jitter : int64_t { JITTER_BRIGHTNESS, JITTER_CONTRAST, JITTER_SATURATION, JITTER_HUE };
constexpr int kOperations = 10, kJitters = 4;

// What is drawn for one sample; lmim_fast.data.guidance.parameters.GuidanceParameters says what each is.
struct Drawn {
    const int64_t* order;  // (10,), -1 after the last one
    double contrast, blur_sigma;
    const double *crop_vertical, *crop_horizontal;  // (2,)
    double sharpen_alpha, sharpen_lightness, angle;
    const double* piecewise;    // (4, 4, 2)
    const double* perspective;  // (4, 2)
    double solarize_threshold;
    bool solarize_above;
    double grayscale_alpha;
    bool jitter;
    const int64_t* jitter_order;    // (4,)
    const double* jitter_factors;   // (4,)
    bool gray;

    bool has(Operation operation) const {
        for (int place = 0; place < kOperations; ++place)
            if (order[place] == operation) return true;
        return false;
    }
};

struct Sides {
    double height, width;
};

// Height and width at which a crop is filtered and warped.
Sides working_size(Sides crop, Sides view);

// Meshes over a view, and what they become between their points.
class Mesh {
public:
    Mesh(int height, int width);

    int height() const { return height_; }
    int width() const { return width_; }
    size_t points() const { return x_.size(); }
    const float* x() const { return x_.data(); }  // centres of the cells and of one ring around, over [0, 1]^2
    const float* y() const { return y_.data(); }

    // Interpolates values at the mesh points to (height, width).
    void densify(const float* values, float* dense) const;

private:
    int height_, width_, rows_, columns_;  // rows and columns of mesh points
    std::vector<float> x_, y_;
};

struct Maps {
    float *x, *y;       // (height, width) source column and row of each view pixel in the shrunk crop, inside it
    uint8_t* coverage;  // (height, width) 255 where the crop is seen
};
void inverse_maps(const Drawn& drawn, Sides crop, Sides working, const Mesh& mesh, const Maps& maps);

// Sum of the filter's kernel.
double filter_gain(const Drawn& drawn);
// Side of the filter's kernel, odd; 1: no filter.
int filter_side(const Drawn& drawn);
// The (side, side) kernel for the shrunk crop.
void filter_kernel(const Drawn& drawn, Sides crop, Sides working, int side, float* kernel);

// lmim_fast.ops.photometric.ColorProgram without the coverage.
struct Colors {
    float *before, *after, *final;  // (3, 4)
    float *threshold, *border, *contrast;  // border (3,)
    bool* invert_above;
};
void color_program(const Drawn& drawn, const Colors& colors);

}  // namespace lmim::guidance
