// Source of the format: LMDB's mdb.c, version 0.9.31 (structures MDB_meta, MDB_db, MDB_page, MDB_node).

#include "lmdb_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

namespace lmim {
namespace {

constexpr uint32_t kMagic = 0xBEEFC0DE, kVersion = 1;
constexpr uint64_t kNone = ~0ull;  // a root's page number in an empty database
constexpr uint64_t kPageHeader = 16, kNodeHeader = 8, kMetaEnd = kPageHeader + 136, kMetas = 2;
constexpr uint64_t kTransaction = kPageHeader + 128;  // in a header's page; its writer writes it last
constexpr uint64_t kLeastPage = 512, kLargestPage = 32768;
constexpr uint64_t kRoom = 1ull << 32;  // bytes of the map behind the end of the file; addresses, no memory
constexpr uint64_t kShort = 256;       // bytes of a value that are copied from the map
constexpr int kDeepest = 32;  // levels that LMDB's cursors have room for
constexpr uint16_t kBranch = 0x01, kLeaf = 0x02, kOverflow = 0x04, kMeta = 0x08, kFixed = 0x20, kSubPage = 0x40;
constexpr uint16_t kBigData = 0x01, kDuplicates = 0x04;
constexpr uint16_t kOrders = 0x7F;  // flags of a database that change its order or what a value is

template <class T>
T load(const uint8_t* at) {  // pages of a file in memory may lie anywhere
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

bool is_layout_ours() {
    const uint16_t one = 1;
    uint8_t first;
    std::memcpy(&first, &one, 1);
    return first == 1 && sizeof(size_t) == 8;
}

std::string number(uint64_t value) { return std::to_string(value); }

// MDB_meta, behind a page's header.
struct Meta {
    uint64_t page_size, root, last_page, transaction;
    uint16_t order;

    Meta(const uint8_t* page) {
        if (!(load<uint16_t>(page + 10) & kMeta) || load<uint32_t>(page + 16) != kMagic)
            throw LmdbDamaged("no LMDB header");
        const uint32_t version = load<uint32_t>(page + 20);
        if (version != kVersion)
            throw LmdbUnsupported("data format version " + number(version) + ", not " + number(kVersion));
        page_size = load<uint32_t>(page + 40);
        // Read first, since it is written last: a header that is just being written then passes for the older one,
        // and is outdated early.
        transaction = load<uint64_t>(page + kTransaction);
        std::atomic_thread_fence(std::memory_order_acquire);
        order = static_cast<uint16_t>(load<uint16_t>(page + 92) & kOrders);
        root = load<uint64_t>(page + 128);
        last_page = load<uint64_t>(page + 136);
    }
};

}  // namespace

struct LmdbFile::Node {
    const uint8_t* start;
    uint64_t offset;  // of the start, in its page
    std::string_view key;

    uint32_t low() const { return load<uint32_t>(start); }
    uint16_t flags() const { return load<uint16_t>(start + 4); }
    uint64_t child() const { return low() | static_cast<uint64_t>(flags()) << 32; }
    uint64_t data() const { return offset + kNodeHeader + key.size(); }
};

struct LmdbFile::Page {
    const uint8_t* start;
    uint64_t page_size, number, nodes, first_node;
    bool branch;

    Node node(uint64_t i) const {
        const uint64_t offset = load<uint16_t>(start + kPageHeader + 2 * i);
        if (offset < first_node || offset + kNodeHeader > page_size) damaged();
        const uint64_t key = load<uint16_t>(start + offset + 6);
        if (offset + kNodeHeader + key > page_size) damaged();
        return {start + offset, offset, {reinterpret_cast<const char*>(start + offset + kNodeHeader), key}};
    }

    // The first node from `low` on whose key is not below `key`.
    uint64_t lower_bound(std::string_view key, uint64_t low) const {
        for (uint64_t high = nodes; low < high;) {
            const uint64_t middle = (low + high) / 2;
            if (node(middle).key < key)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }

    [[noreturn]] void damaged() const { throw LmdbDamaged("page " + lmim::number(number) + " is damaged"); }
};

LmdbFile::LmdbFile(const std::string& path, bool readahead) {
    file_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file_ < 0) throw LmdbRefused(errno, std::string("cannot be opened: ") + std::strerror(errno));
    try {
        map(readahead);
        open();
    } catch (...) {
        if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), size_);
        close(file_);
        throw;
    }
}

void LmdbFile::map(bool readahead) {
    const uint64_t size = readable();
    if (size == 0) throw LmdbDamaged("the file is empty");
    size_ = 2 * size + kRoom;
    void* map = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file_, 0);
    if (map == MAP_FAILED && errno == ENOMEM) {  // addresses are limited
        size_ = size;
        map = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file_, 0);
    }
    if (map == MAP_FAILED) throw LmdbRefused(errno, std::string("cannot be mapped: ") + std::strerror(errno));
    data_ = static_cast<const uint8_t*>(map);
    if (!readahead) {  // advice only: nothing depends on its success
        madvise(map, size_, MADV_RANDOM);
        posix_fadvise(file_, 0, 0, POSIX_FADV_RANDOM);
    }
}

LmdbFile::LmdbFile(const uint8_t* data, uint64_t size) : data_(data), size_(size) { open(); }

LmdbFile::~LmdbFile() {
    if (file_ < 0) return;
    munmap(const_cast<uint8_t*>(data_), size_);
    close(file_);
}

void LmdbFile::open() {
    if (!is_layout_ours()) throw LmdbUnsupported("this machine is not a 64-bit little-endian one");
    if (std::min(size_, readable()) < kMetaEnd) throw LmdbDamaged("the file is cut short");
    page_size_ = Meta(data_).page_size;
    const bool power_of_two = (page_size_ & (page_size_ - 1)) == 0;
    if (page_size_ < kLeastPage || page_size_ > kLargestPage || !power_of_two)
        throw LmdbDamaged("pages of " + number(page_size_) + " bytes");
    snapshot();
}

// Bytes of the file now: it may have been cut since it was mapped.
uint64_t LmdbFile::readable() const {
    if (file_ < 0) return size_;
    struct stat status;
    if (fstat(file_, &status) != 0) throw LmdbRefused(errno, std::string("no status: ") + std::strerror(errno));
    return static_cast<uint64_t>(status.st_size);
}

LmdbFile::Snapshot LmdbFile::snapshot() const {
    if (std::min(size_, readable()) / page_size_ < kMetas) throw LmdbDamaged("the file is cut short");
    const Meta first(data_), second(data_ + page_size_);
    const Meta& meta = first.transaction < second.transaction ? second : first;
    if (first.page_size != page_size_ || second.page_size != page_size_)
        throw LmdbDamaged("its two headers have different page sizes");
    if (meta.order != 0) throw LmdbUnsupported("its keys are in an order of their own");
    const uint64_t pages = std::min(size_, readable()) / page_size_;  // after the header: the file may be growing
    if (meta.last_page >= pages)
        throw LmdbDamaged("it has " + number(pages) + " pages, its header needs more");  // or it has grown
    return {meta.root, meta.last_page + 1, meta.transaction, meta.root == kNone};
}

uint64_t LmdbFile::newest_transaction() const {
    return std::max(load<uint64_t>(data_ + kTransaction), load<uint64_t>(data_ + page_size_ + kTransaction));
}

bool LmdbFile::outdated(const Snapshot& snapshot) const {
    std::atomic_thread_fence(std::memory_order_acquire);  // what was read before is not read later
    return newest_transaction() - snapshot.transaction > 1;
}

LmdbFile::Page LmdbFile::page(const Snapshot& snapshot, uint64_t at) const {
    if (at < kMetas || at >= snapshot.pages) throw LmdbDamaged("there is no page " + number(at));
    Page page{data_ + at * page_size_, page_size_, at, 0, 0, false};
    const uint16_t flags = load<uint16_t>(page.start + 10);
    const uint64_t lower = load<uint16_t>(page.start + 12), upper = load<uint16_t>(page.start + 14);
    page.branch = flags & kBranch;
    const bool of_a_tree = page.branch != static_cast<bool>(flags & kLeaf);
    if (load<uint64_t>(page.start) != at || !of_a_tree || (flags & (kOverflow | kMeta | kFixed | kSubPage)))
        page.damaged();
    if (lower < kPageHeader || lower > upper || upper > page_size_) page.damaged();
    page.nodes = (lower - kPageHeader) / 2;
    page.first_node = upper;
    return page;
}

std::optional<LmdbFile::Value> LmdbFile::find(const Snapshot& snapshot, std::string_view key) const {
    if (snapshot.empty) return std::nullopt;
    Page page = this->page(snapshot, snapshot.root);
    for (int depth = 1; page.branch; ++depth) {
        if (depth == kDeepest || page.nodes == 0) page.damaged();
        // The first node stands for everything below the second one's key.
        uint64_t i = page.lower_bound(key, 1);
        if (i == page.nodes || page.node(i).key != key) --i;
        page = this->page(snapshot, page.node(i).child());
    }
    const uint64_t i = page.lower_bound(key, 0);
    if (i == page.nodes) return std::nullopt;
    const Node node = page.node(i);
    if (node.key != key) return std::nullopt;
    if (node.flags() & kDuplicates) page.damaged();
    const uint64_t length = node.low();
    const bool own_pages = node.flags() & kBigData;
    if (node.data() + (own_pages ? 8 : length) > page_size_) page.damaged();
    if (!own_pages) return Value{page.number * page_size_ + node.data(), length, false};
    const uint64_t first = load<uint64_t>(page.start + node.data());
    if (first < kMetas || first >= snapshot.pages) page.damaged();
    const uint64_t offset = first * page_size_ + kPageHeader;
    if (length > snapshot.pages * page_size_ - offset) page.damaged();
    return Value{offset, length, true};
}

void LmdbFile::read(const Snapshot& snapshot, const Value& value, uint8_t* to) const {
    if (!value.own_pages && value.length <= kShort) {
        std::memcpy(to, data_ + value.offset, value.length);
        return;
    }
    if (!value.own_pages) return copy(value.offset, nullptr, 0, to, value.length);
    uint8_t header[kPageHeader];
    copy(value.offset - kPageHeader, header, kPageHeader, to, value.length);
    const uint64_t first = value.offset / page_size_, pages = load<uint32_t>(header + 12);
    const bool fits = pages <= snapshot.pages - first && kPageHeader + value.length <= pages * page_size_;
    if (load<uint64_t>(header) != first || !(load<uint16_t>(header + 10) & kOverflow) || !fits)
        throw LmdbDamaged("page " + number(first) + " is damaged");
}

// Bytes from `offset` on: first into the header, then to `to`.
void LmdbFile::copy(uint64_t offset, uint8_t* header, uint64_t header_size, uint8_t* to, uint64_t length) const {
    if (file_ < 0) {
        if (header_size) std::memcpy(header, data_ + offset, header_size);
        if (length) std::memcpy(to, data_ + offset + header_size, length);
        return;
    }
    iovec parts[] = {{header, header_size}, {to, length}};
    while (parts[0].iov_len + parts[1].iov_len > 0) {
        const ssize_t got = preadv(file_, parts, 2, static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw LmdbRefused(errno, std::string("cannot be read: ") + std::strerror(errno));
        if (got == 0) throw LmdbDamaged("the file is cut short");
        offset += static_cast<uint64_t>(got);
        size_t left = static_cast<size_t>(got);
        for (iovec& part : parts) {
            const size_t taken = std::min(left, part.iov_len);
            part.iov_base = static_cast<uint8_t*>(part.iov_base) + taken;
            part.iov_len -= taken;
            left -= taken;
        }
    }
}

}  // namespace lmim
