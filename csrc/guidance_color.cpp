#include <algorithm>
#include <cmath>

#include "guidance.h"

namespace lmim::guidance {
namespace {

constexpr double kLuma[3] = {0.299, 0.587, 0.114};  // lmim_fast.ops.photometric.LUMA
constexpr double kContrastCentre = 128.0;
constexpr float kNever = 256.0f;  // a threshold that no value reaches
constexpr double kTurn = 2 * 3.14159265358979323846;

using Color = std::array<double, 3>;

struct Affine {
    double linear[3][3] = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}};
    Color offset{0, 0, 0};

    void then(const Affine& step) {
        Affine both;
        for (int i = 0; i < 3; ++i) {
            const double* row = step.linear[i];
            for (int j = 0; j < 3; ++j)
                both.linear[i][j] = row[0] * linear[0][j] + row[1] * linear[1][j] + row[2] * linear[2][j];
            both.offset[i] = row[0] * offset[0] + row[1] * offset[1] + row[2] * offset[2] + step.offset[i];
        }
        *this = both;
    }

    Color apply(const Color& color) const {
        Color result;
        for (int i = 0; i < 3; ++i) {
            const double value =
                linear[i][0] * color[0] + linear[i][1] * color[1] + linear[i][2] * color[2] + offset[i];
            result[i] = std::min(std::max(value, 0.0), 255.0);
        }
        return result;
    }

    void write(float* to) const {  // (3, 4)
        for (int i = 0; i < 3; ++i) {
            for (int j = 0; j < 3; ++j) *to++ = static_cast<float>(linear[i][j]);
            *to++ = static_cast<float>(offset[i]);
        }
    }
};

Affine scale(double factor, double lift = 0.0) {
    Affine affine;
    for (int i = 0; i < 3; ++i) {
        affine.linear[i][i] = factor;
        affine.offset[i] = lift;
    }
    return affine;
}

// Blend with the gray image: alpha 1 is gray, below 0 adds colour.
Affine towards_gray(double alpha) {
    Affine affine;
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) affine.linear[i][j] = (1.0 - alpha) * (i == j) + alpha * kLuma[j];
    return affine;
}

// Rotation of the colours about the gray axis.
Affine hue_rotation(double turns) {
    static constexpr double cross[3][3] = {{0, -1, 1}, {1, 0, -1}, {-1, 1, 0}};
    const double cosine = std::cos(kTurn * turns), sine = std::sin(kTurn * turns), root = std::sqrt(3.0);
    Affine affine;
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j)
            affine.linear[i][j] = cosine * (i == j) + sine * (cross[i][j] / root) + (1.0 - cosine) / 3.0;
    return affine;
}

// The colour jitter before its contrast, and what follows it, the final grayscale included.
void compose_jitter(const Drawn& drawn, Affine& early, Affine& final) {
    const double* factors = drawn.jitter_factors;
    bool contrast_done = false;
    for (int place = 0; drawn.jitter && place < kJitters; ++place) {
        Affine& here = contrast_done ? final : early;
        switch (drawn.jitter_order[place]) {
            case JITTER_BRIGHTNESS: here.then(scale(factors[JITTER_BRIGHTNESS])); break;
            case JITTER_SATURATION: here.then(towards_gray(1.0 - factors[JITTER_SATURATION])); break;
            case JITTER_HUE: here.then(hue_rotation(factors[JITTER_HUE])); break;
            case JITTER_CONTRAST: contrast_done = true; break;
            default: break;
        }
    }
    if (drawn.gray) final.then(towards_gray(1.0));
}

}  // namespace

void color_program(const Drawn& drawn, const Colors& colors) {
    const double gain = filter_gain(drawn), threshold = drawn.solarize_threshold;
    Affine before, current = scale(1.0 / gain);
    Color border{0, 0, 0};  // what rotation leaves black, as later operations change it
    bool solarizes = false;
    for (int place = 0; place < kOperations; ++place) {
        Affine step;
        switch (drawn.order[place]) {
            case CONTRAST: step = scale(drawn.contrast, kContrastCentre * (1.0 - drawn.contrast)); break;
            case GRAYSCALE: step = towards_gray(drawn.grayscale_alpha); break;
            case SHARPEN: step = scale(gain); break;
            case ROTATE: border = {0, 0, 0}; continue;
            case SOLARIZE:
                solarizes = true;
                before = current;
                current = Affine();
                for (double& value : border)
                    if ((value >= threshold) == drawn.solarize_above) value = 255.0 - value;
                continue;
            default: continue;
        }
        border = step.apply(border);
        current.then(step);
    }
    if (!solarizes) {
        before = current;
        current = Affine();
    }
    Affine early, final;
    compose_jitter(drawn, early, final);
    current.then(early);
    border = early.apply(border);
    before.write(colors.before);
    current.write(colors.after);
    final.write(colors.final);
    for (int i = 0; i < 3; ++i) colors.border[i] = static_cast<float>(border[static_cast<size_t>(i)]);
    *colors.threshold = solarizes ? static_cast<float>(threshold) : kNever;
    *colors.invert_above = drawn.solarize_above || !solarizes;
    *colors.contrast = drawn.jitter ? static_cast<float>(drawn.jitter_factors[JITTER_CONTRAST]) : 1.0f;
}

}  // namespace lmim::guidance
