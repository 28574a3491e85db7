// Values of one LMDB file by key, read without LMDB: many threads, no transaction, no Python.
//
// Format: LMDB 0.9, data version 1, 64-bit little-endian; the unnamed database with keys in byte order.

#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace lmim {

// The file contradicts itself or ends too early.
struct LmdbDamaged : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The system does not open, map or read the file, which says nothing about what is in it.
struct LmdbRefused : std::runtime_error {
    LmdbRefused(int code, const std::string& reason) : std::runtime_error(reason), code(code) {}
    const int code;  // errno
};

// A file that LMDB may read and this code does not.
struct LmdbUnsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A writer commits faster than anything can be read.
struct LmdbBusy : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The tree is walked in a map of the file, and a value is read in one piece from the file itself: one request to the
// disk where a map needs one for each page, and a disk that fails there is an error and no signal. Short values, as
// labels are, lie on the page that was walked last: they are copied from the map. Every number found
// in the file is checked before it is used, so a damaged file is LmdbDamaged and never a read outside of it; only a file
// that is cut while its tree is walked takes the map away from under the walk (SIGBUS). The map is longer than the
// file: what a writer appends is seen in it.
//
// No lock tells a writer what is being read. Transaction n leaves alone what n - 1 and n - 2 show, so a snapshot is
// whole until the second commit after it, and may be written over from then on: what was found by `find` and `read` is
// true if the snapshot is not outdated afterwards. `in_one_snapshot` sees to that.
class LmdbFile {
public:
    // The newest state that was committed.
    struct Snapshot {
        uint64_t root = 0, pages = 0, transaction = 0;
        bool empty = true;
    };

    // A value's bytes in the file. With a page of its own it has a header in front, which `read` checks.
    struct Value {
        uint64_t offset = 0, length = 0;
        bool own_pages = false;
    };

    // readahead: false for data larger than the memory.
    LmdbFile(const std::string& path, bool readahead);
    // A file in memory, which must outlive this.
    LmdbFile(const uint8_t* data, uint64_t size);
    ~LmdbFile();
    LmdbFile(const LmdbFile&) = delete;
    LmdbFile& operator=(const LmdbFile&) = delete;

    Snapshot snapshot() const;
    // Whether a writer may have written over pages of the snapshot.
    bool outdated(const Snapshot& snapshot) const;
    // Calls `work` until the snapshot was whole from its start to its end; each time after the first, the snapshot is a
    // new one. Throws what `work` throws in a whole snapshot, or LmdbBusy.
    template <class Work>
    void in_one_snapshot(Snapshot& snapshot, const Work& work) const;
    std::optional<Value> find(const Snapshot& snapshot, std::string_view key) const;
    // Writes the value's bytes to `to`.
    void read(const Snapshot& snapshot, const Value& value, uint8_t* to) const;

private:
    struct Node;
    struct Page;

    void map(bool readahead);
    void open();
    uint64_t readable() const;
    uint64_t newest_transaction() const;
    Page page(const Snapshot& snapshot, uint64_t number) const;
    void copy(uint64_t offset, uint8_t* header, uint64_t header_size, uint8_t* to, uint64_t length) const;

    const uint8_t* data_ = nullptr;
    uint64_t size_ = 0, page_size_ = 0;  // size_: of the map, or of the file in memory
    int file_ = -1;
};

template <class Work>
void LmdbFile::in_one_snapshot(Snapshot& snapshot, const Work& work) const {
    constexpr int kTries = 100;  // two commits in the microseconds of each one: no writer does that
    for (int tries = 0; tries < kTries; ++tries) {
        if (tries > 0) snapshot = this->snapshot();
        try {
            work(snapshot);
        } catch (const LmdbDamaged&) {
            if (!outdated(snapshot)) throw;
            continue;
        }
        if (!outdated(snapshot)) return;
    }
    throw LmdbBusy("tried " + std::to_string(kTries) + " times");
}

}  // namespace lmim
