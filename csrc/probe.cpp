// Python binding of image_headers.h: a batch at a time, without the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "bindings.h"
#include "image_headers.h"

namespace py = pybind11;

namespace {

// The images' memory, held while the GIL is not.
class Buffers {
public:
    explicit Buffers(const py::sequence& images) {
        views_.reserve(images.size());
        for (const py::handle image : images) {
            Py_buffer view;
            if (PyObject_GetBuffer(image.ptr(), &view, PyBUF_SIMPLE) != 0) {
                release();
                throw py::error_already_set();
            }
            views_.push_back(view);
        }
    }
    ~Buffers() { release(); }
    Buffers(const Buffers&) = delete;
    Buffers& operator=(const Buffers&) = delete;

    size_t size() const { return views_.size(); }
    const uint8_t* data(size_t i) const { return static_cast<const uint8_t*>(views_[i].buf); }
    size_t size(size_t i) const { return static_cast<size_t>(views_[i].len); }

private:
    void release() {
        for (Py_buffer& view : views_) PyBuffer_Release(&view);
        views_.clear();
    }

    std::vector<Py_buffer> views_;
};

py::tuple probe(const py::sequence& images, uint64_t max_pixels) {
    const Buffers buffers(images);
    const auto count = static_cast<py::ssize_t>(buffers.size());
    py::array_t<uint8_t> status(count);
    py::array_t<int32_t> height(count), width(count);
    uint8_t* statuses = status.mutable_data();
    int32_t *heights = height.mutable_data(), *widths = width.mutable_data();
    {
        const lmim::WithoutGil without_gil;
        for (size_t i = 0; i < buffers.size(); ++i) {
            const lmim::Verdict verdict = lmim::read_header(buffers.data(i), buffers.size(i), max_pixels);
            statuses[i] = static_cast<uint8_t>(verdict.status);
            heights[i] = static_cast<int32_t>(verdict.size.height);
            widths[i] = static_cast<int32_t>(verdict.size.width);
        }
    }
    return py::make_tuple(status, height, width);
}

}  // namespace

void lmim::bind_probe(py::module_& module) {
    module.def("probe", &probe, py::arg("images"), py::arg("max_pixels"),
               "Status (uint8), height and width (int32) of each encoded image; see lmim_fast.data.store.probe.");
}
