// Python binding of guidance.h: the programs of a batch, without the GIL.

#include "guidance.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"
#include "workers.h"

namespace py = pybind11;

namespace lmim {
namespace {

constexpr double kLargestSigma = 40.0;  // a kernel of 237 pixels: no size overflows
constexpr size_t kGrain = 4;  // samples of one piece of work, ~40 us

// An argument (B, ...) of a fixed shape behind its first dimension.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void check_shape(const py::array& array, const char* name, size_t batch, std::initializer_list<size_t> rest) {
    bool right = array.ndim() == static_cast<py::ssize_t>(1 + rest.size()) &&
                 array.shape(0) == static_cast<py::ssize_t>(batch);
    py::ssize_t axis = 1;
    for (const size_t side : rest) right = right && array.shape(axis++) == static_cast<py::ssize_t>(side);
    if (!right) throw py::value_error(std::string(name) + " has the wrong shape for " + std::to_string(batch) + " samples");
}

template <typename T>
Array<T> field(const py::handle& parameters, const char* name, size_t batch, std::initializer_list<size_t> rest) {
    const auto array = py::array_t<T, py::array::c_style | py::array::forcecast>::ensure(parameters.attr(name));
    if (!array) throw py::error_already_set();
    check_shape(array, name, batch, rest);
    return array;
}

// The arrays of lmim_fast.data.guidance.parameters.GuidanceParameters.
struct Parameters {
    Array<int64_t> order, jitter_order;
    Array<double> contrast, blur_sigma, crop_vertical, crop_horizontal, sharpen_alpha, sharpen_lightness, angle;
    Array<double> piecewise, perspective, solarize_threshold, grayscale_alpha, jitter_factors;
    Array<bool> solarize_above, jitter, gray;

    Parameters(const py::handle& from, size_t batch)
        : order(field<int64_t>(from, "order", batch, {guidance::kOperations})),
          jitter_order(field<int64_t>(from, "jitter_order", batch, {guidance::kJitters})),
          contrast(field<double>(from, "contrast", batch, {})),
          blur_sigma(field<double>(from, "blur_sigma", batch, {})),
          crop_vertical(field<double>(from, "crop_vertical", batch, {2})),
          crop_horizontal(field<double>(from, "crop_horizontal", batch, {2})),
          sharpen_alpha(field<double>(from, "sharpen_alpha", batch, {})),
          sharpen_lightness(field<double>(from, "sharpen_lightness", batch, {})),
          angle(field<double>(from, "angle", batch, {})),
          piecewise(field<double>(from, "piecewise", batch, {4, 4, 2})),
          perspective(field<double>(from, "perspective", batch, {4, 2})),
          solarize_threshold(field<double>(from, "solarize_threshold", batch, {})),
          grayscale_alpha(field<double>(from, "grayscale_alpha", batch, {})),
          jitter_factors(field<double>(from, "jitter_factors", batch, {guidance::kJitters})),
          solarize_above(field<bool>(from, "solarize_above", batch, {})),
          jitter(field<bool>(from, "jitter", batch, {})),
          gray(field<bool>(from, "gray", batch, {})) {}

    guidance::Drawn at(size_t i) const {
        return {order.data() + guidance::kOperations * i,
                contrast.data()[i],
                blur_sigma.data()[i],
                crop_vertical.data() + 2 * i,
                crop_horizontal.data() + 2 * i,
                sharpen_alpha.data()[i],
                sharpen_lightness.data()[i],
                angle.data()[i],
                piecewise.data() + 32 * i,
                perspective.data() + 8 * i,
                solarize_threshold.data()[i],
                solarize_above.data()[i],
                grayscale_alpha.data()[i],
                jitter.data()[i],
                jitter_order.data() + guidance::kJitters * i,
                jitter_factors.data() + guidance::kJitters * i,
                gray.data()[i]};
    }
};

// lmim_fast.data.guidance.kernels.Kernels
struct Kernels {
    Array<int64_t> sides;
    std::vector<size_t> starts;
    Array<float> taps;

    Kernels(const Parameters& parameters, size_t batch) : sides(static_cast<py::ssize_t>(batch)) {
        size_t total = 0;
        for (size_t i = 0; i < batch; ++i) {
            const guidance::Drawn drawn = parameters.at(i);
            if (!(drawn.blur_sigma > 0.0 && drawn.blur_sigma <= kLargestSigma))
                throw py::value_error("blur_sigma must be in (0, 40], got " + std::to_string(drawn.blur_sigma));
            const int side = guidance::filter_side(drawn);
            sides.mutable_data()[i] = side;
            starts.push_back(total);
            total += static_cast<size_t>(side) * static_cast<size_t>(side);
        }
        taps = Array<float>(static_cast<py::ssize_t>(total));
    }
};

py::tuple guidance_programs(const py::object& parameters, const Array<int32_t>& heights, const Array<int32_t>& widths,
                           Array<float> working, Array<float> map_x, Array<float> map_y, Array<uint8_t> coverage,
                           Array<float> before, Array<float> threshold, Array<bool> invert_above, Array<float> after,
                           Array<float> border, Array<float> contrast, Array<float> final, Workers* workers) {
    const size_t batch = static_cast<size_t>(heights.size());
    if (map_x.ndim() != 3 || map_x.shape(1) < 1 || map_x.shape(2) < 1)
        throw py::value_error("map_x must be (B, H, W)");
    const auto height = static_cast<size_t>(map_x.shape(1)), width = static_cast<size_t>(map_x.shape(2));
    check_shape(heights, "heights", batch, {});
    check_shape(widths, "widths", batch, {});
    check_shape(working, "working", batch, {2});
    check_shape(map_x, "map_x", batch, {height, width});
    check_shape(map_y, "map_y", batch, {height, width});
    check_shape(coverage, "coverage", batch, {height, width});
    for (const auto& [array, name] : {std::pair{&before, "before"}, {&after, "after"}, {&final, "final"}})
        check_shape(*array, name, batch, {3, 4});
    check_shape(border, "border", batch, {3});
    check_shape(threshold, "threshold", batch, {});
    check_shape(invert_above, "invert_above", batch, {});
    check_shape(contrast, "contrast", batch, {});
    const Parameters drawn(parameters, batch);
    Kernels kernels(drawn, batch);
    const int32_t *rows = heights.data(), *columns = widths.data();
    for (size_t i = 0; i < batch; ++i)
        if (rows[i] < 1 || columns[i] < 1) throw py::value_error("heights and widths must be positive");
    float *to_working = working.mutable_data(), *to_x = map_x.mutable_data(), *to_y = map_y.mutable_data();
    uint8_t* to_coverage = coverage.mutable_data();
    const int64_t* sides = kernels.sides.data();
    float* taps = kernels.taps.mutable_data();
    const guidance::Colors colors{before.mutable_data(),    after.mutable_data(),  final.mutable_data(),
                                  threshold.mutable_data(), border.mutable_data(), contrast.mutable_data(),
                                  invert_above.mutable_data()};
    {
        const WithoutGil without_gil;
        const guidance::Mesh mesh(static_cast<int>(height), static_cast<int>(width));
        const guidance::Sides view{static_cast<double>(height), static_cast<double>(width)};
        const size_t pixels = height * width;
        const auto work = [&](size_t begin, size_t end) {
            for (size_t i = begin; i < end; ++i) {
                const guidance::Drawn sample = drawn.at(i);
                const guidance::Sides crop{static_cast<double>(rows[i]), static_cast<double>(columns[i])};
                const guidance::Sides small = guidance::working_size(crop, view);
                to_working[2 * i] = static_cast<float>(small.height);
                to_working[2 * i + 1] = static_cast<float>(small.width);
                guidance::inverse_maps(sample, crop, small, mesh,
                                       {to_x + i * pixels, to_y + i * pixels, to_coverage + i * pixels});
                guidance::filter_kernel(sample, crop, small, static_cast<int>(sides[i]), taps + kernels.starts[i]);
                guidance::color_program(sample, {colors.before + 12 * i, colors.after + 12 * i, colors.final + 12 * i,
                                                 colors.threshold + i, colors.border + 3 * i, colors.contrast + i,
                                                 colors.invert_above + i});
            }
        };
        if (workers == nullptr) {
            work(0, batch);
        } else {
            workers->run(batch, kGrain, work);
        }
    }
    return py::make_tuple(kernels.sides, kernels.taps);
}

}  // namespace

void bind_guidance(py::module_& module) {
    // The arrays are written in place: a conversion would write into a copy.
    module.def("guidance_programs", &guidance_programs, py::arg("parameters"), py::arg("heights"), py::arg("widths"),
               py::arg("working").noconvert(), py::arg("map_x").noconvert(), py::arg("map_y").noconvert(),
               py::arg("coverage").noconvert(), py::arg("before").noconvert(), py::arg("threshold").noconvert(),
               py::arg("invert_above").noconvert(), py::arg("after").noconvert(), py::arg("border").noconvert(),
               py::arg("contrast").noconvert(), py::arg("final").noconvert(), py::arg("workers") = py::none(),
               "Fill the programs of B samples, return the filters' kernels; see lmim_fast.data.guidance.program.");
}

}  // namespace lmim
