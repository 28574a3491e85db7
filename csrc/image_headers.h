// Status, height and width of one encoded image from its header. No Python in here.

#pragma once

#include <cstddef>
#include <cstdint>

namespace lmim {

// lmim_fast.data.store.probe.Status
enum class Status : uint8_t { OK, EMPTY, NOT_AN_IMAGE, TRUNCATED, TOO_LARGE, INVALID, UNSUPPORTED };

struct Size {
    uint64_t height, width;
};

// Height and width are 0 unless the status is OK or TOO_LARGE.
struct Verdict {
    Status status;
    Size size{0, 0};
};

// JPEG, PNG, GIF, WebP or BMP; anything else is NOT_AN_IMAGE. Never reads outside data[0 .. size).
// max_pixels: at most 2^40, so that no product of sizes overflows.
Verdict read_header(const uint8_t* data, size_t size, uint64_t max_pixels);

}  // namespace lmim
