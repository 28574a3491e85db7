// Python binding of photometric.h: the views of a batch, without the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "photometric.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void require_shape(const py::array& array, const char* name, const std::vector<py::ssize_t>& shape) {
    bool equal = array.ndim() == static_cast<py::ssize_t>(shape.size());
    for (size_t axis = 0; equal && axis < shape.size(); ++axis) equal = array.shape(axis) == shape[axis];
    if (!equal) throw py::value_error(std::string(name) + " does not have the shape that the images ask for");
}

// What images (B, H, W, 3) and views (B, 3, H, W) have in common.
struct Sizes {
    template <typename T>
    Sizes(const Array<uint8_t>& images, const Array<T>& views) {
        if (images.ndim() != 4 || images.shape(3) != 3) throw py::value_error("images must be (B, H, W, 3)");
        batch = images.shape(0), height = images.shape(1), width = images.shape(2);
        require_shape(views, "views", {batch, 3, height, width});
        pixels = static_cast<size_t>(height * width);
    }
    py::ssize_t batch, height, width;
    size_t pixels;
};

// Runs make(image number, its view) for a batch; a view in bfloat16 is made in single precision first.
template <typename Make>
void each(const Sizes& sizes, float* views, const Make& make) {
    for (py::ssize_t i = 0; i < sizes.batch; ++i) make(i, views + i * 3 * sizes.pixels);
}

template <typename Make>
void each(const Sizes& sizes, int16_t* views, const Make& make) {
    const size_t values = 3 * sizes.pixels;
    std::vector<float> view(values);
    for (py::ssize_t i = 0; i < sizes.batch; ++i) {
        make(i, view.data());
        lmim::round_to_bfloat16(view.data(), values, reinterpret_cast<uint16_t*>(views) + i * values);
    }
}

template <typename T>
void plain_views(const Array<uint8_t>& images, Array<T>& views) {
    const Sizes sizes(images, views);
    const uint8_t* bytes = images.data();
    T* out = views.mutable_data();
    const lmim::WithoutGil without_gil;
    each(sizes, out, [&](py::ssize_t i, float* view) {
        lmim::plain_view(bytes + i * 3 * sizes.pixels, sizes.pixels, view);
    });
}

template <typename T>
void guidance_views(const Array<uint8_t>& images, const Array<float>& before, const Array<float>& threshold,
                    const Array<bool>& invert_above, const Array<float>& after, const Array<uint8_t>& coverage,
                    const Array<float>& border, const Array<float>& contrast, const Array<float>& final,
                    Array<T>& views) {
    const Sizes sizes(images, views);
    require_shape(before, "before", {sizes.batch, 3, 4});
    require_shape(threshold, "threshold", {sizes.batch});
    require_shape(invert_above, "invert_above", {sizes.batch});
    require_shape(after, "after", {sizes.batch, 3, 4});
    require_shape(coverage, "coverage", {sizes.batch, sizes.height, sizes.width});
    require_shape(border, "border", {sizes.batch, 3});
    require_shape(contrast, "contrast", {sizes.batch});
    require_shape(final, "final", {sizes.batch, 3, 4});
    const uint8_t *bytes = images.data(), *covered = coverage.data();
    const float *befores = before.data(), *thresholds = threshold.data(), *afters = after.data();
    const float *borders = border.data(), *contrasts = contrast.data(), *finals = final.data();
    const bool* above = invert_above.data();
    T* out = views.mutable_data();
    const lmim::WithoutGil without_gil;
    each(sizes, out, [&](py::ssize_t i, float* view) {
        const lmim::Colors colors{befores + 12 * i,
                                  thresholds[i],
                                  above[i],
                                  afters + 12 * i,
                                  covered + i * sizes.pixels,
                                  borders + 3 * i,
                                  contrasts[i],
                                  finals + 12 * i};
        lmim::guidance_view(bytes + i * 3 * sizes.pixels, colors, sizes.pixels, view);
    });
}

template <typename T>
void bind(py::module_& module) {
    module.def("plain_views", &plain_views<T>, py::arg("images").noconvert(), py::arg("views").noconvert(),
               "Normalise images (B, H, W, 3) uint8 into views (B, 3, H, W): float32, or bfloat16 as int16.");
    module.def("guidance_views", &guidance_views<T>, py::arg("images").noconvert(), py::arg("before").noconvert(),
               py::arg("threshold").noconvert(), py::arg("invert_above").noconvert(), py::arg("after").noconvert(),
               py::arg("coverage").noconvert(), py::arg("border").noconvert(), py::arg("contrast").noconvert(),
               py::arg("final").noconvert(), py::arg("views").noconvert(),
               "Colour and normalise: fields of a ColorProgram in their order, images and views as in plain_views.");
}

}  // namespace

void lmim::bind_photometric(py::module_& module) {
    bind<float>(module);
    bind<int16_t>(module);
}
