// Each part of lmim_fast._C adds its functions to the module.

#pragma once

#include <pybind11/pybind11.h>

namespace lmim {

void bind_workers(pybind11::module_& module);
void bind_probe(pybind11::module_& module);
void bind_gather(pybind11::module_& module);
void bind_philox(pybind11::module_& module);
void bind_guidance(pybind11::module_& module);
void bind_views(pybind11::module_& module);
void bind_photometric(pybind11::module_& module);

}  // namespace lmim
