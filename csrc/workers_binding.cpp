// Python binding of workers.h.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <system_error>

#include "bindings.h"
#include "workers.h"

namespace py = pybind11;

void lmim::bind_workers(py::module_& module) {
    py::class_<lmim::Workers>(module, "Workers", "Threads that share the images of a batch; they end with the object.")
        .def(py::init([](int64_t threads) {
                 if (threads < 1) throw py::value_error("threads must be >= 1, got " + std::to_string(threads));
                 try {
                     return new lmim::Workers(static_cast<size_t>(threads));
                 } catch (const std::system_error& error) {
                     throw std::runtime_error(std::to_string(threads) + " data threads cannot be started (" +
                                              error.code().message() + "); use fewer, or raise the limit of processes");
                 }
             }),
             py::arg("threads"))
        .def_property_readonly("threads", &lmim::Workers::threads, "The calling thread is one of them.");
}
