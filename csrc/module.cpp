// lmim_fast._C: what the input pipeline does without the GIL.

#include "bindings.h"

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native parts of lmim_fast.";
    // Another number whenever a function is added or takes or gives other values; lmim_fast/native.py has it, too.
    module.attr("interface") = 4;
    lmim::bind_workers(module);
    lmim::bind_probe(module);
    lmim::bind_gather(module);
    lmim::bind_guidance(module);
    lmim::bind_philox(module);
    lmim::bind_views(module);
    lmim::bind_photometric(module);
}
