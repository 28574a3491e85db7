// Python binding of workers.h.

#include <pybind11/pybind11.h>

#include "bindings.h"
#include "workers.h"

namespace py = pybind11;

void lmim::bind_workers(py::module_& module) {
    py::class_<lmim::Workers>(module, "Workers", "Threads that share the images of a batch; they end with the object.")
        .def(py::init([](int64_t threads) {
                 if (threads < 1) throw py::value_error("threads must be >= 1, got " + std::to_string(threads));
                 return new lmim::Workers(static_cast<size_t>(threads));
             }),
             py::arg("threads"))
        .def_property_readonly("threads", &lmim::Workers::threads, "The calling thread is one of them.");
}
