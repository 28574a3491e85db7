// Python binding of gather.h: a batch at a time, without the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <exception>

#include "bindings.h"
#include "gather.h"

namespace py = pybind11;

namespace {

using Numbers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// They live as long as the module, which Python never unloads.
PyObject *damaged_type = nullptr, *refused_type = nullptr, *busy_type = nullptr;

[[noreturn]] void raise(PyObject* type, const py::tuple& arguments) {
    PyErr_SetObject(type, arguments.ptr());
    throw py::error_already_set();
}

[[noreturn]] void raise(const lmim::RecordUnreadable& error) {
    try {
        std::rethrow_if_nested(error);
    } catch (const lmim::LmdbRefused& refused) {
        raise(refused_type, py::make_tuple(refused.code, error.which));
    } catch (const lmim::LmdbBusy& busy) {
        raise(busy_type, py::make_tuple(busy.what(), error.which));
    } catch (const std::runtime_error&) {
    }
    raise(damaged_type, py::make_tuple(error.what(), error.which));
}

py::tuple gather_batch(const std::vector<std::shared_ptr<lmim::LmdbFile>>& files, const Numbers& databases,
                       const Numbers& numbers, uint64_t max_pixels, size_t rectangle_bytes, lmim::Workers* workers) {
    const py::ssize_t count = databases.size();
    if (databases.ndim() != 1 || numbers.ndim() != 1 || numbers.size() != count)
        throw py::value_error("databases and numbers must be vectors of one length");
    for (py::ssize_t i = 0; i < count; ++i)
        if (databases.at(i) < 0 || databases.at(i) >= static_cast<int64_t>(files.size()))
            throw py::index_error("there is no database " + std::to_string(databases.at(i)));
    py::array_t<int64_t> offsets(count), lengths(count);
    py::array_t<uint8_t> status(count);
    py::array_t<int32_t> heights(count), widths(count);
    const lmim::Wanted wanted{files, databases.data(), numbers.data(), static_cast<size_t>(count)};
    const lmim::Images images{offsets.mutable_data(), lengths.mutable_data(), status.mutable_data(),
                              heights.mutable_data(), widths.mutable_data()};
    lmim::Arena arena;
    try {
        const lmim::WithoutGil without_gil;
        lmim::Workers alone(1);
        arena = lmim::gather(wanted, images, max_pixels, rectangle_bytes, workers ? *workers : alone);
    } catch (const lmim::RecordUnreadable& error) {
        raise(error);
    }
    const uint8_t* bytes = arena.bytes.get();
    const py::capsule owner(arena.bytes.release(), [](void* memory) { delete[] static_cast<uint8_t*>(memory); });
    const py::array_t<uint8_t> block(static_cast<py::ssize_t>(arena.size), bytes, owner);
    return py::make_tuple(block, arena.stride, offsets, lengths, status, heights, widths);
}

py::list find_values(const lmim::LmdbFile& file, const std::vector<std::string>& keys) {
    std::vector<std::optional<std::string>> found;
    try {
        const lmim::WithoutGil without_gil;
        found = lmim::values(file, keys);
    } catch (const lmim::RecordUnreadable& error) {
        raise(error);
    }
    py::list list;
    for (const std::optional<std::string>& value : found)
        list.append(value ? py::object(py::bytes(*value)) : py::none());
    return list;
}

std::shared_ptr<lmim::LmdbFile> open_file(const std::string& path, bool readahead) {
    try {
        return std::make_shared<lmim::LmdbFile>(path, readahead);
    } catch (const lmim::LmdbRefused& error) {
        errno = error.code;
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
        throw py::error_already_set();
    }
}

}  // namespace

void lmim::bind_gather(py::module_& module) {
    damaged_type = py::register_exception<LmdbDamaged>(module, "LmdbDamaged").ptr();
    refused_type = py::register_exception<LmdbRefused>(module, "LmdbRefused").ptr();
    busy_type = py::register_exception<LmdbBusy>(module, "LmdbBusy").ptr();
    py::register_exception<LmdbUnsupported>(module, "LmdbUnsupported");
    py::class_<LmdbFile, std::shared_ptr<LmdbFile>>(module, "LmdbFile", "A data.mdb, mapped as long as this lives.")
        .def(py::init(&open_file), py::arg("path"), py::arg("readahead"));
    module.def("gather", &gather_batch, py::arg("files"), py::arg("databases"), py::arg("numbers"), py::arg("max_pixels"),
               py::arg("rectangle_bytes"), py::arg("workers") = nullptr,
               "Arena (uint8), stride, offsets and lengths (int64), status (uint8), heights and widths (int32) of "
               "records' images; see lmim_fast.data.store.gather. Raises LmdbDamaged(reason, place in the batch), "
               "LmdbRefused(errno, place) and LmdbBusy(reason, place).");
    module.def("values", &find_values, py::arg("file"), py::arg("keys"),
               "The values of keys (bytes), None where one is absent. Raises as `gather`, with the place in `keys`.");
}
