// Values of LMDB files: the images of a batch in one block of memory with the verdicts on their headers, and the values
// of any keys. No Python in here.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "image_headers.h"
#include "lmdb_file.h"
#include "workers.h"

namespace lmim {

// The record `which` of the batch cannot be read; the error nested in it says why.
struct RecordUnreadable : std::runtime_error {
    RecordUnreadable(size_t which, const std::string& reason) : std::runtime_error(reason), which(which) {}
    const size_t which;
};

// Images of count records: the record i is `image-%09d` with numbers[i] in files[databases[i]].
struct Wanted {
    const std::vector<std::shared_ptr<LmdbFile>>& files;
    const int64_t *databases, *numbers;
    size_t count;
};

// (count,) each, given by the caller. An absent key is an image of no bytes, which is EMPTY.
struct Images {
    int64_t *offsets, *lengths;  // in the arena
    uint8_t* status;
    int32_t *heights, *widths;
};

struct Arena {
    std::unique_ptr<uint8_t[]> bytes;
    size_t size = 0;
    size_t stride = 0;  // between the images, or 0 where one follows the other
};

// At equal distances, that of the longest image, if that takes at most `rectangle_bytes`; what lies between them is
// left as it was. Throws RecordUnreadable.
Arena gather(const Wanted& wanted, const Images& images, uint64_t max_pixels, size_t rectangle_bytes,
             Workers& workers);

// The values of the keys, none where a key is absent. Throws RecordUnreadable.
std::vector<std::optional<std::string>> values(const LmdbFile& file, const std::vector<std::string>& keys);

}  // namespace lmim
