// Python binding of views.h: the views of a batch of decoded crops, without the GIL.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "views.h"
#include "workers.h"

namespace py = pybind11;

namespace lmim {
namespace {

constexpr int64_t kLargestSide = 255;  // of a filter
constexpr size_t kGrain = 2;  // crops of one piece of work, ~80 us

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// The crops' memory, held while the GIL is not.
class Crops {
public:
    explicit Crops(const py::sequence& images) {
        views_.reserve(images.size());
        try {
            for (const py::handle image : images) add(image);
        } catch (...) {
            release();
            throw;
        }
    }
    ~Crops() { release(); }
    Crops(const Crops&) = delete;
    Crops& operator=(const Crops&) = delete;

    size_t size() const { return views_.size(); }
    Crop at(size_t i) const {
        const Py_buffer& view = views_[i];
        return {static_cast<const uint8_t*>(view.buf), static_cast<size_t>(view.shape[0]),
                static_cast<size_t>(view.shape[1])};
    }

private:
    void add(const py::handle image) {
        Py_buffer view;
        if (PyObject_GetBuffer(image.ptr(), &view, PyBUF_C_CONTIGUOUS) != 0) throw py::error_already_set();
        views_.push_back(view);
        if (view.itemsize != 1 || view.ndim != 3 || view.shape[0] < 1 || view.shape[1] < 1 || view.shape[2] != 3)
            throw py::value_error("a crop must be (height, width, 3) uint8");
    }

    void release() {
        for (Py_buffer& view : views_) PyBuffer_Release(&view);
        views_.clear();
    }

    std::vector<Py_buffer> views_;
};

void check_views(const Array<uint8_t>& views, size_t batch, const char* name) {
    if (views.ndim() != 4 || views.shape(0) != static_cast<py::ssize_t>(batch) || views.shape(1) < 1 ||
        views.shape(2) < 1 || views.shape(3) != 3)
        throw py::value_error(std::string(name) + " must be (B, H, W, 3) for " + std::to_string(batch) + " crops");
}

template <typename Work>
void for_each(Workers* workers, size_t count, const Work& work) {
    const auto pieces = [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) work(i);
    };
    if (workers == nullptr) {
        pieces(0, count);
    } else {
        workers->run(count, kGrain, pieces);
    }
}

ViewSize size_of(const Array<uint8_t>& views) {
    return {static_cast<size_t>(views.shape(1)), static_cast<size_t>(views.shape(2))};
}

void plain_views_of(const py::sequence& images, Array<uint8_t> plain, Workers* workers) {
    const Crops crops(images);
    check_views(plain, crops.size(), "plain");
    const ViewSize size = size_of(plain);
    uint8_t* to = plain.mutable_data();
    const WithoutGil without_gil;
    for_each(workers, crops.size(), [&](size_t i) { make_plain_view(crops.at(i), size, to + i * 3 * size.height * size.width); });
}

void warped_views_of(const py::sequence& images, const Array<float>& working, const Array<int64_t>& sides,
                     const Array<float>& taps, const Array<float>& map_x, const Array<float>& map_y,
                     Array<uint8_t> warped, Workers* workers) {
    const Crops crops(images);
    const size_t batch = crops.size();
    check_views(warped, batch, "warped");
    const ViewSize size = size_of(warped);
    const size_t pixels = size.height * size.width;
    for (const auto* map : {&map_x, &map_y})
        if (map->ndim() != 3 || map->shape(1) != warped.shape(1) || map->shape(2) != warped.shape(2) ||
            static_cast<size_t>(map->shape(0)) != batch)
            throw py::value_error("maps must be (B, H, W) like the views");
    if (working.ndim() != 2 || static_cast<size_t>(working.shape(0)) != batch || working.shape(1) != 2)
        throw py::value_error("working sizes must be (B, 2)");
    if (static_cast<size_t>(sides.size()) != batch) throw py::value_error("there must be one kernel for each crop");
    std::vector<WarpProgram> programs(batch);
    size_t next = 0;
    for (size_t i = 0; i < batch; ++i) {
        const int64_t side = sides.data()[i];
        const float height = working.data()[2 * i], width = working.data()[2 * i + 1];
        if (side < 1 || side > kLargestSide || side % 2 == 0)
            throw py::value_error("a kernel's side must be odd and at most 255, got " + std::to_string(side));
        if (!(height >= 1.0f && width >= 1.0f && height <= 65536.0f && width <= 65536.0f))
            throw py::value_error("working sizes must be in [1, 65536]");
        programs[i] = {{static_cast<size_t>(height + 0.5f), static_cast<size_t>(width + 0.5f)},
                       static_cast<size_t>(side),
                       taps.data() + next,
                       map_x.data() + i * pixels,
                       map_y.data() + i * pixels};
        next += static_cast<size_t>(side * side);
    }
    if (next != static_cast<size_t>(taps.size())) throw py::value_error("the kernels' sides do not fit their taps");
    uint8_t* to = warped.mutable_data();
    const WithoutGil without_gil;
    for_each(workers, batch, [&](size_t i) { make_warped_view(crops.at(i), programs[i], size, to + i * 3 * pixels); });
}

}  // namespace

void bind_views(py::module_& module) {
    module.def("make_plain_views", &plain_views_of, py::arg("crops"), py::arg("plain").noconvert(),
               py::arg("workers") = py::none(), "Bicubic views (B, H, W, 3) of decoded crops; see lmim_fast.data.dali.");
    module.def("make_warped_views", &warped_views_of, py::arg("crops"), py::arg("working"), py::arg("sides"),
               py::arg("taps"), py::arg("map_x"), py::arg("map_y"), py::arg("warped").noconvert(),
               py::arg("workers") = py::none(), "Filtered and warped views of decoded crops; see lmim_fast.data.dali.");
}

}  // namespace lmim
