#include <algorithm>
#include <cmath>

#include "guidance.h"

namespace lmim::guidance {
namespace {

constexpr double kWindowSigma = 1.5;  // up to here imgaug's window is the least, 5 x 5
constexpr int kLeastRadius = 2, kSharpenRadius = 1;
constexpr double kLeastGain = 1e-3;

int blur_radius(double sigma) {
    return kLeastRadius + static_cast<int>(std::ceil(3.0 * std::max(sigma - kWindowSigma, 0.0)));
}

using Taps = std::vector<double>;  // of a kernel along one axis; the middle one is the centre

Taps blur_taps(bool blurs, double sigma, int window, int reach) {
    Taps taps(static_cast<size_t>(2 * reach + 1), 0.0);
    double total = 0.0;
    for (int tap = -window; tap <= window; ++tap) {
        const double scaled = tap / sigma;
        const double weight = blurs ? std::exp(-0.5 * (scaled * scaled)) : tap == 0;
        taps[static_cast<size_t>(reach + tap)] = weight;
        total += weight;
    }
    for (double& tap : taps) tap /= total;
    return taps;
}

Taps sums_of_three(const Taps& taps) {
    Taps sums(taps.size());
    for (size_t i = 0; i < taps.size(); ++i)
        sums[i] = (i ? taps[i - 1] : 0.0) + taps[i] + (i + 1 < taps.size() ? taps[i + 1] : 0.0);
    return sums;
}

// Carries taps to a grid `scale` times coarser: filter.resample_matrices.
Taps resampled(const Taps& taps, double scale, int radius) {
    Taps moved(taps.size(), 0.0);
    const int reach = static_cast<int>(taps.size() / 2), inner = std::max(radius - 1, 0);
    for (int tap = -reach; tap <= reach; ++tap) {
        const double value = taps[static_cast<size_t>(reach + tap)], position = tap / scale;
        const double nearest = std::min(std::max(std::nearbyint(position), double(-inner)), double(inner));
        const double rest = position - nearest;
        double* to = &moved[static_cast<size_t>(reach + static_cast<int>(nearest))];
        to[-1] += (rest * rest - rest) / 2 * value;
        to[0] += (1 - rest * rest) * value;
        to[1] += (rest * rest + rest) / 2 * value;
    }
    return moved;
}

}  // namespace

double filter_gain(const Drawn& drawn) {
    if (!drawn.has(SHARPEN)) return 1.0;
    return std::max(1.0 - drawn.sharpen_alpha * (1.0 - drawn.sharpen_lightness), kLeastGain);
}

int filter_side(const Drawn& drawn) {
    const int radius = (drawn.has(BLUR) ? blur_radius(drawn.blur_sigma) : 0) + (drawn.has(SHARPEN) ? kSharpenRadius : 0);
    return 2 * radius + 1;
}

void filter_kernel(const Drawn& drawn, Sides crop, Sides working, int side, float* kernel) {
    if (side == 1) {
        *kernel = 1.0f;
        return;
    }
    const bool blurs = drawn.has(BLUR);
    const int window = blurs ? blur_radius(drawn.blur_sigma) : kLeastRadius, reach = window + kSharpenRadius;
    // imgaug's Sharpen: (1 - alpha) * identity + alpha * [[-1, -1, -1], [-1, 8 + lightness, -1], [-1, -1, -1]], that is
    // a multiple of the identity and a multiple of nine ones. Both stay products of rows and columns when blurred.
    const double alpha = drawn.has(SHARPEN) ? drawn.sharpen_alpha : 0.0;
    const double centre = 1.0 - alpha + alpha * (8.0 + drawn.sharpen_lightness) + alpha, around = -alpha;
    const Taps blur = blur_taps(blurs, drawn.blur_sigma, window, reach), box = sums_of_three(blur);
    const int radius = side / 2;
    const double down = crop.height / working.height, across = crop.width / working.width;
    const Taps rows = resampled(blur, down, radius), columns = resampled(blur, across, radius);
    const Taps box_rows = resampled(box, down, radius), box_columns = resampled(box, across, radius);
    for (int row = -radius; row <= radius; ++row)
        for (int column = -radius; column <= radius; ++column) {
            const auto i = static_cast<size_t>(reach + row), j = static_cast<size_t>(reach + column);
            *kernel++ = static_cast<float>(centre * (rows[i] * columns[j]) + around * (box_rows[i] * box_columns[j]));
        }
}

}  // namespace lmim::guidance
