// Python binding of philox.h.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "philox.h"

namespace py = pybind11;

namespace lmim {
namespace {

template <typename T>
void philox_into(uint64_t seed, const py::array_t<int64_t, py::array::c_style>& epochs,
                 const py::array_t<int64_t, py::array::c_style>& indices, uint32_t stream,
                 py::array_t<T, py::array::c_style> values) {
    const auto samples = static_cast<size_t>(indices.size());
    const bool one = epochs.size() == 1;
    if (values.ndim() != 2 || values.shape(0) != indices.size() || (!one && epochs.size() != indices.size()))
        throw py::value_error("values must be (B, count) for B indices, with one epoch or B of them");
    T* to = values.mutable_data();
    const int64_t *from = epochs.data(), *of = indices.data();
    const auto count = static_cast<size_t>(values.shape(1));
    const WithoutGil without_gil;
    philox(seed, from, one ? 0 : 1, of, samples, count, stream, to);
}

}  // namespace

void bind_philox(py::module_& module) {
    const char* about = "Fill (B, count) with the random numbers of B samples; see lmim_fast.ops.philox.";
    module.def("philox", &philox_into<int64_t>, py::arg("seed"), py::arg("epochs"), py::arg("indices"),
               py::arg("stream"), py::arg("values").noconvert(), about);
    module.def("philox", &philox_into<float>, py::arg("seed"), py::arg("epochs"), py::arg("indices"),
               py::arg("stream"), py::arg("values").noconvert(), about);
}

}  // namespace lmim
