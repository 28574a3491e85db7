#include <algorithm>
#include <cmath>

#include "guidance.h"
#include "simd.h"

namespace lmim::guidance {
namespace {

constexpr double kOversampling = 2.0;
constexpr int kCellHeight = 2, kCellWidth = 4;  // view pixels per mesh cell; `densify` has the weights of these
constexpr double kRadians = 3.14159265358979323846 / 180.0;

struct Matrix {
    double at[3][3] = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}};
};

Matrix scaling(double x, double y) {
    Matrix matrix;
    matrix.at[0][0] = x;
    matrix.at[1][1] = y;
    return matrix;
}

Matrix operator*(const Matrix& left, const Matrix& right) {
    Matrix product;
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j)
            product.at[i][j] =
                left.at[i][0] * right.at[0][j] + left.at[i][1] * right.at[1][j] + left.at[i][2] * right.at[2][j];
    return product;
}

using Size = std::array<double, 2>;  // width, height

struct Step {
    Matrix back;  // canvas after the operation -> canvas before it
    Size size;    // of the canvas after it
};

Step cut(Size size, int axis, const double* shares) {
    const double length = size[axis];
    const double first = std::nearbyint(shares[0] * length), last = std::nearbyint(shares[1] * length);
    const double kept = std::max(length - first - last, 1.0);
    Step step{{}, size};
    step.back.at[axis][axis] = kept / length;
    step.back.at[axis][2] = std::min(first, length - 1.0);
    return step;
}

// The rounding keeps an angle of 0 from adding a pixel.
double grown(double reach) { return std::ceil(std::nearbyint(reach * 1e6) / 1e6); }

Step rotate(Size size, double angle) {
    const double cosine = std::cos(angle * kRadians), sine = std::sin(angle * kRadians);
    const double c = std::abs(cosine), s = std::abs(sine), width = size[0] - 1, height = size[1] - 1;
    Step step{{}, {grown(c * width + s * height + 1), grown(s * width + c * height + 1)}};
    const double x = step.size[0] / 2, y = step.size[1] / 2;
    auto& at = step.back.at;
    at[0][0] = cosine;
    at[0][1] = sine;
    at[1][0] = -sine;
    at[1][1] = cosine;
    at[0][2] = size[0] / 2 - (cosine * x + sine * y);
    at[1][2] = size[1] / 2 - (-sine * x + cosine * y);
    return step;
}

// Heckbert's unit square to quadrilateral, for the canvas and its corners moved inwards.
Step perspective(Size size, const double* inward) {
    static constexpr double corners[4][2] = {{0, 0}, {1, 0}, {1, 1}, {0, 1}};
    double quad[4][2];
    for (int corner = 0; corner < 4; ++corner)
        for (int axis = 0; axis < 2; ++axis)
            quad[corner][axis] =
                corners[corner][axis] + inward[2 * corner + axis] * (1.0 - 2.0 * corners[corner][axis]);
    double d1[2], d2[2], total[2];
    for (int axis = 0; axis < 2; ++axis) {
        d1[axis] = quad[1][axis] - quad[2][axis];
        d2[axis] = quad[3][axis] - quad[2][axis];
        total[axis] = quad[0][axis] - quad[1][axis] + quad[2][axis] - quad[3][axis];
    }
    const double determinant = d1[0] * d2[1] - d2[0] * d1[1];
    const double g = (total[0] * d2[1] - d2[0] * total[1]) / determinant;
    const double h = (d1[0] * total[1] - total[0] * d1[1]) / determinant;
    Matrix matrix;
    for (int axis = 0; axis < 2; ++axis) {
        matrix.at[axis][0] = quad[1][axis] - quad[0][axis] + g * quad[1][axis];
        matrix.at[axis][1] = quad[3][axis] - quad[0][axis] + h * quad[3][axis];
        matrix.at[axis][2] = quad[0][axis];
    }
    matrix.at[2][0] = g;
    matrix.at[2][1] = h;
    return {scaling(size[0], size[1]) * matrix * scaling(1.0 / size[0], 1.0 / size[1]), size};
}

Step step_of(const Drawn& drawn, int64_t operation, Size size) {
    switch (operation) {
        case CROP_HORIZONTAL: return cut(size, 0, drawn.crop_horizontal);
        case CROP_VERTICAL: return cut(size, 1, drawn.crop_vertical);
        case PERSPECTIVE: return perspective(size, drawn.perspective);
        case ROTATE: return rotate(size, drawn.angle);
        default: return {{}, size};
    }
}

// geometry._Chain
struct Chain {
    Matrix to_piecewise, to_crop, to_rotated;
    Size piecewise_size, rotated_size, final_size;
    bool rotated_first = false;
};

Chain compose(const Drawn& drawn, Size size) {
    Chain chain;
    chain.piecewise_size = chain.rotated_size = size;
    Matrix crop_from, rotated_from;
    bool rotation_done = false;
    for (int place = 0; place < kOperations; ++place) {
        const int64_t operation = drawn.order[place];
        if (operation == ROTATE) {
            chain.rotated_size = size;
            rotation_done = true;
        }
        const Step step = step_of(drawn, operation, size);
        crop_from = crop_from * step.back;
        if (rotation_done) rotated_from = rotated_from * step.back;
        // The piecewise warp cuts the chain: what was composed leads from its canvas to the crop.
        if (operation == PIECEWISE_AFFINE) {
            chain.to_crop = crop_from;
            chain.piecewise_size = size;
            crop_from = Matrix();
            if (rotation_done) {
                chain.to_rotated = rotated_from;
                chain.rotated_first = true;
            }
        }
        size = step.size;
    }
    const Matrix to_canvas = scaling(size[0], size[1]);
    chain.final_size = size;
    chain.to_piecewise = crop_from * to_canvas;
    if (!chain.rotated_first) chain.to_rotated = rotated_from * to_canvas;
    return chain;
}

LMIM_SIMD void project(const Matrix& matrix, const float* x, const float* y, size_t count, float* to_x, float* to_y) {
    float m[3][3];
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) m[i][j] = static_cast<float>(matrix.at[i][j]);
    for (size_t i = 0; i < count; ++i) {
        const float u = x[i], v = y[i];
        const float depth = m[2][0] * u + m[2][1] * v + m[2][2];
        to_x[i] = (m[0][0] * u + m[0][1] * v + m[0][2]) / depth;
        to_y[i] = (m[1][0] * u + m[1][1] * v + m[1][2]) / depth;
    }
}

// Here and below, std::max(0.0f, value) is 0 for what is no number, which a strong perspective may give at its horizon.

// Moves points by the piecewise affine warp over its canvas: 4x4 control points, each cell two triangles.
LMIM_SIMD void bend(const double* piecewise, Size size, size_t count, float* x, float* y) {
    const float width = static_cast<float>(size[0]), height = static_cast<float>(size[1]);
    float shift_x[16], shift_y[16];
    for (int i = 0; i < 16; ++i) {
        shift_x[i] = static_cast<float>(piecewise[2 * i] * static_cast<double>(width));
        shift_y[i] = static_cast<float>(piecewise[2 * i + 1] * static_cast<double>(height));
    }
    const float across = 3.0f / width, down = 3.0f / height, right = width - 0.5f, bottom = height - 0.5f;
    for (size_t i = 0; i < count; ++i) {
        float u = std::min(std::max(0.0f, x[i] * across), 3.0f), v = std::min(std::max(0.0f, y[i] * down), 3.0f);
        const int column = static_cast<int>(std::min(u, 2.0f)), line = static_cast<int>(std::min(v, 2.0f));
        u -= static_cast<float>(column);
        v -= static_cast<float>(line);
        const int lower = u + v >= 1.0f;  // the triangle at the cell's end: the same planes, seen from there
        const int corner = (line + lower) * 4 + column + lower, turn = lower ? -1 : 1;
        u = lower ? 1.0f - u : u;
        v = lower ? 1.0f - v : v;
        const float start_x = shift_x[corner], start_y = shift_y[corner];
        const float move_x = (shift_x[corner + turn] - start_x) * u + (shift_x[corner + 4 * turn] - start_x) * v;
        const float move_y = (shift_y[corner + turn] - start_y) * u + (shift_y[corner + 4 * turn] - start_y) * v;
        x[i] = std::min(std::max(0.5f, x[i] + start_x + move_x), right);
        y[i] = std::min(std::max(0.5f, y[i] + start_y + move_y), bottom);
    }
}

LMIM_SIMD void shrink(const float* values, float factor, size_t count, float* shrunk) {
    for (size_t i = 0; i < count; ++i) shrunk[i] = values[i] * factor - 0.5f;
}

LMIM_SIMD void clamp(float* values, float limit, size_t count) {
    for (size_t i = 0; i < count; ++i) values[i] = std::min(std::max(0.0f, values[i]), limit);
}

LMIM_SIMD void from_middle(const float* values, float middle, float soft, size_t count, float* widths) {
    for (size_t i = 0; i < count; ++i) widths[i] = (values[i] - middle) / soft;
}

LMIM_SIMD void cover(const float* x, const float* y, float reach_x, float reach_y, size_t count, uint8_t* coverage) {
    for (size_t i = 0; i < count; ++i) {
        const float share_x = std::min(std::max(0.0f, reach_x - std::abs(x[i])), 1.0f);
        const float share_y = std::min(std::max(0.0f, reach_y - std::abs(y[i])), 1.0f);
        coverage[i] = static_cast<uint8_t>(static_cast<int>(share_x * share_y * 255.0f + 0.5f));
    }
}

struct Scratch {
    std::vector<float> view_x, view_y, x, y, part;
    std::vector<float> dense_x, dense_y;
    explicit Scratch(const Mesh& mesh) {
        for (std::vector<float>* points : {&view_x, &view_y, &x, &y, &part}) points->resize(mesh.points());
        const size_t pixels = static_cast<size_t>(mesh.height()) * static_cast<size_t>(mesh.width());
        dense_x.resize(pixels);
        dense_y.resize(pixels);
    }
};

// Share of each view pixel inside the rotated canvas; `bent` are points on the piecewise warp's canvas.
void find_coverage(const Drawn& drawn, const Chain& chain, const Mesh& mesh, const float* bent_x, const float* bent_y,
                   Scratch& scratch, uint8_t* coverage) {
    const size_t count = mesh.points();
    project(chain.to_rotated, chain.rotated_first ? bent_x : mesh.x(), chain.rotated_first ? bent_y : mesh.y(), count,
            scratch.view_x.data(), scratch.view_y.data());
    // The edge is as soft as resampling makes it: a pixel of the canvas, or of the view where that is coarser.
    const double across = chain.final_size[0] / mesh.width(), down = chain.final_size[1] / mesh.height();
    const double c = std::abs(std::cos(drawn.angle * kRadians)), s = std::abs(std::sin(drawn.angle * kRadians));
    const double softness[2] = {std::max(c * across + s * down, 1.0), std::max(c * down + s * across, 1.0)};
    float* dense[2] = {scratch.dense_x.data(), scratch.dense_y.data()};
    const float* inside[2] = {scratch.view_x.data(), scratch.view_y.data()};
    float reach[2];
    for (int axis = 0; axis < 2; ++axis) {
        const float middle = static_cast<float>(chain.rotated_size[axis] / 2), soft = static_cast<float>(softness[axis]);
        from_middle(inside[axis], middle, soft, count, scratch.part.data());
        mesh.densify(scratch.part.data(), dense[axis]);
        reach[axis] = middle / soft + 0.5f;
    }
    cover(dense[0], dense[1], reach[0], reach[1], scratch.dense_x.size(), coverage);
}

}  // namespace

Sides working_size(Sides crop, Sides view) {
    return {std::min(crop.height, std::nearbyint(view.height * kOversampling)),
            std::min(crop.width, std::nearbyint(view.width * kOversampling))};
}

Mesh::Mesh(int height, int width)
    : height_(height),
      width_(width),
      rows_((height + kCellHeight - 1) / kCellHeight + 2),
      columns_((width + kCellWidth - 1) / kCellWidth + 2) {
    const float down = static_cast<float>(static_cast<double>(kCellHeight) / height);
    const float across = static_cast<float>(static_cast<double>(kCellWidth) / width);
    for (int row = 0; row < rows_; ++row)
        for (int column = 0; column < columns_; ++column) {
            x_.push_back((static_cast<float>(column - 1) + 0.5f) * across);
            y_.push_back((static_cast<float>(row - 1) + 0.5f) * down);
        }
}

LMIM_SIMD void blend(const float* above, const float* below, float weight, size_t count, float* dense) {
    const float rest = 1.0f - weight;
    for (size_t i = 0; i < count; ++i) dense[i] = above[i] * rest + below[i] * weight;
}

LMIM_SIMD void widen(const float* values, size_t cells, float* wide) {
    for (size_t cell = 0; cell < cells; ++cell) {
        const float left = values[cell], here = values[cell + 1], right = values[cell + 2];
        wide[4 * cell] = left * 0.375f + here * 0.625f;
        wide[4 * cell + 1] = left * 0.125f + here * 0.875f;
        wide[4 * cell + 2] = here * 0.875f + right * 0.125f;
        wide[4 * cell + 3] = here * 0.625f + right * 0.375f;
    }
}

void Mesh::densify(const float* values, float* dense) const {
    const auto cells = static_cast<size_t>(columns_ - 2), across = static_cast<size_t>(columns_);
    const size_t stride = cells * kCellWidth, width = static_cast<size_t>(width_);
    thread_local std::vector<float> rows;
    rows.resize(static_cast<size_t>(rows_) * stride);
    for (size_t row = 0; row < static_cast<size_t>(rows_); ++row) widen(values + row * across, cells, &rows[row * stride]);
    for (size_t y = 0; y < static_cast<size_t>(height_); ++y) {
        const float* above = &rows[(y / 2 + y % 2) * stride];
        blend(above, above + stride, y % 2 ? 0.25f : 0.75f, width, dense + y * width);
    }
}

void inverse_maps(const Drawn& drawn, Sides crop, Sides working, const Mesh& mesh, const Maps& maps) {
    const Chain chain = compose(drawn, {crop.width, crop.height});
    const size_t count = mesh.points(), pixels = static_cast<size_t>(mesh.height()) * static_cast<size_t>(mesh.width());
    Scratch scratch(mesh);
    float *bent_x = scratch.x.data(), *bent_y = scratch.y.data();
    project(chain.to_piecewise, mesh.x(), mesh.y(), count, bent_x, bent_y);
    if (drawn.has(PIECEWISE_AFFINE) && std::min(chain.piecewise_size[0], chain.piecewise_size[1]) > 1.0)
        bend(drawn.piecewise, chain.piecewise_size, count, bent_x, bent_y);
    float *source_x = scratch.view_x.data(), *source_y = scratch.view_y.data();
    project(chain.to_crop, bent_x, bent_y, count, source_x, source_y);
    const std::array<float*, 2> sources{source_x, source_y}, dense{maps.x, maps.y};
    const double whole[2] = {crop.width, crop.height}, small[2] = {working.width, working.height};
    for (size_t axis = 0; axis < 2; ++axis) {
        shrink(sources[axis], static_cast<float>(small[axis] / whole[axis]), count, scratch.part.data());
        mesh.densify(scratch.part.data(), dense[axis]);
        clamp(dense[axis], static_cast<float>(small[axis] - 1.0), pixels);
    }
    if (drawn.has(ROTATE)) {
        find_coverage(drawn, chain, mesh, bent_x, bent_y, scratch, maps.coverage);
    } else {
        std::fill_n(maps.coverage, pixels, uint8_t{255});
    }
}

}  // namespace lmim::guidance
