// Each part of lmim_fast._C adds its functions to the module.

#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace lmim {

// Other Python threads run while this lives. A thread that comes back when the interpreter has ended never gets the
// lock: before Python 3.14 its stack is unwound, through destructors that need the lock, and the process aborts. Here
// it waits for the end of the process, as Python 3.14 has it.
class WithoutGil {
public:
    WithoutGil() : thread_(PyEval_SaveThread()) {}
    ~WithoutGil() {
        try {
            PyEval_RestoreThread(thread_);
        } catch (...) {
            while (true) pause();
        }
    }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;

private:
    PyThreadState* thread_;
};

void bind_workers(pybind11::module_& module);
void bind_probe(pybind11::module_& module);
void bind_gather(pybind11::module_& module);
void bind_philox(pybind11::module_& module);
void bind_guidance(pybind11::module_& module);
void bind_views(pybind11::module_& module);
void bind_photometric(pybind11::module_& module);

}  // namespace lmim
