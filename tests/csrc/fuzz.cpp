// Feeds damaged input to the parts of csrc that need no Python; built with sanitizers by fuzz.py.
//
//     fuzz probe MAX_PIXELS < images        a line for each: status, height, width
//     fuzz lmdb DATABASE KEYS < mutations   a line for each: keys found as before, found otherwise, absent, errors
//     fuzz views < samples                  a line for each: whether its maps stay inside the crop
//
// An image is its size (uint32) and its bytes. A mutation is a count (uint32) and that many places (uint64) and
// bytes (uint8) to write there; the size of the file that it begins with (uint64) cuts it short. A sample is heights and
// widths of crop and view (4 uint32), what is drawn for it, and its pixels. All little-endian.
// A new part of csrc gets a function and a line in kTargets.

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "gather.h"
#include "guidance.h"
#include "image_headers.h"
#include "lmdb_file.h"
#include "views.h"

namespace {

using Arguments = std::vector<std::string>;

// Memory of exactly its size, so that the sanitizer sees a read of one byte too many.
std::unique_ptr<uint8_t[]> exactly(size_t size) { return std::unique_ptr<uint8_t[]>(new uint8_t[size]); }

template <class T>
bool take(T& value) {
    return std::fread(&value, sizeof value, 1, stdin) == 1;
}

void need(bool there) {
    if (!there) throw std::runtime_error("the input ends too early");
}

void probe(const Arguments& arguments) {
    const uint64_t max_pixels = std::stoull(arguments.at(0));
    for (uint32_t size; take(size);) {
        const auto data = exactly(size);
        need(std::fread(data.get(), 1, size, stdin) == size);
        const lmim::Verdict verdict = lmim::read_header(data.get(), size, max_pixels);
        std::printf("%d %" PRIu64 " %" PRIu64 "\n", int(verdict.status), verdict.size.height, verdict.size.width);
    }
}

// Bytes and verdict of each image, or why there is none.
std::vector<std::string> images(const uint8_t* data, uint64_t size, size_t count, lmim::Workers& workers) {
    std::vector<std::string> found(count, "error");
    try {
        const std::vector<std::shared_ptr<lmim::LmdbFile>> files{std::make_shared<lmim::LmdbFile>(data, size)};
        const std::vector<int64_t> databases(count, 0);
        std::vector<int64_t> numbers(count), offsets(count), lengths(count);
        std::vector<uint8_t> status(count);
        std::vector<int32_t> heights(count), widths(count);
        for (size_t i = 0; i < count; ++i) numbers[i] = static_cast<int64_t>(i);
        const auto read = [&](size_t from, size_t many) {  // as many records as one batch
            const lmim::Wanted wanted{files, databases.data(), numbers.data() + from, many};
            const lmim::Images out{offsets.data(), lengths.data(), status.data(), heights.data(), widths.data()};
            const lmim::Arena arena = lmim::gather(wanted, out, 1 << 26, from % 2 ? 1 << 20 : 0, workers);
            for (size_t i = 0; i < many; ++i) {
                const char* start = reinterpret_cast<const char*>(arena.bytes.get()) + offsets[i];
                found[from + i].assign(start, static_cast<size_t>(lengths[i]));
            }
        };
        try {
            read(0, count);
        } catch (const lmim::RecordUnreadable&) {
            for (size_t i = 0; i < count; ++i) try {
                    read(i, 1);
                } catch (const lmim::RecordUnreadable&) {
                }
        }
        for (size_t i = 0; i < count; ++i) {  // by key: the same
            std::string value = "error";
            char key[32];
            std::snprintf(key, sizeof key, "image-%09zu", i);
            try {
                value = lmim::values(*files[0], {key})[0].value_or("");
            } catch (const lmim::RecordUnreadable&) {
            }
            if (value != found[i]) throw std::logic_error(std::string(key) + " has two values");
        }
    } catch (const lmim::LmdbDamaged&) {
    } catch (const lmim::LmdbUnsupported&) {
    }
    return found;
}

void lmdb(const Arguments& arguments) {
    std::ifstream file(arguments.at(0), std::ios::binary);
    const std::vector<char> original{std::istreambuf_iterator<char>(file), {}};
    const size_t count = std::stoull(arguments.at(1));
    lmim::Workers workers(2);
    const auto all = reinterpret_cast<const uint8_t*>(original.data());
    const std::vector<std::string> expected = images(all, original.size(), count, workers);
    for (uint64_t size; take(size);) {
        need(size <= original.size());
        const auto data = exactly(size);
        std::memcpy(data.get(), original.data(), size);
        uint32_t changes;
        need(take(changes));
        while (changes-- > 0) {
            uint64_t place;
            uint8_t value;
            need(take(place) && take(value));
            if (place < size) data[place] = value;
        }
        size_t same = 0, other = 0, absent = 0, errors = 0;
        const std::vector<std::string> found = images(data.get(), size, count, workers);
        for (size_t i = 0; i < count; ++i) {
            if (found[i] == "error") {
                ++errors;
            } else if (found[i] == expected[i]) {
                ++same;
            } else {
                ++(found[i].empty() ? absent : other);
            }
        }
        std::printf("%zu %zu %zu %zu\n", same, other, absent, errors);
    }
}

// What is drawn, as it comes from the stream.
struct Sample {
    int64_t order[lmim::guidance::kOperations], jitter_order[lmim::guidance::kJitters];
    double contrast, blur_sigma, crop_vertical[2], crop_horizontal[2], sharpen_alpha, sharpen_lightness, angle;
    double piecewise[32], perspective[8], solarize_threshold, grayscale_alpha, jitter_factors[4];
    uint64_t above, jitter, gray;

    lmim::guidance::Drawn drawn() const {
        return {order,         contrast,      blur_sigma,           crop_vertical, crop_horizontal, sharpen_alpha,
                sharpen_lightness, angle,     piecewise,            perspective,   solarize_threshold, above != 0,
                grayscale_alpha,   jitter != 0, jitter_order,       jitter_factors, gray != 0};
    }
};

template <class T>
struct Exactly {
    explicit Exactly(size_t count) : bytes(exactly(count * sizeof(T))) {}
    T* data() const { return reinterpret_cast<T*>(bytes.get()); }
    std::unique_ptr<uint8_t[]> bytes;
};

void views(const Arguments&) {
    using namespace lmim;
    for (uint32_t sizes[4]; take(sizes);) {
        Sample sample;
        need(take(sample));
        const size_t height = sizes[0], width = sizes[1], pixels = static_cast<size_t>(sizes[2]) * sizes[3];
        const auto image = exactly(3 * height * width);
        need(std::fread(image.get(), 1, 3 * height * width, stdin) == 3 * height * width);
        const guidance::Drawn drawn = sample.drawn();
        const guidance::Sides crop{double(height), double(width)};
        const guidance::Sides small = guidance::working_size(crop, {double(sizes[2]), double(sizes[3])});
        const guidance::Mesh mesh{static_cast<int>(sizes[2]), static_cast<int>(sizes[3])};
        const Exactly<float> map_x(pixels), map_y(pixels), before(12), after(12), final(12), border(3), rest(2);
        const auto coverage = exactly(pixels), view = exactly(3 * pixels);
        bool invert_above;
        guidance::inverse_maps(drawn, crop, small, mesh, {map_x.data(), map_y.data(), coverage.get()});
        guidance::color_program(drawn, {before.data(), after.data(), final.data(), rest.data(), border.data(),
                                        rest.data() + 1, &invert_above});
        const int side = guidance::filter_side(drawn);
        const Exactly<float> kernel(static_cast<size_t>(side) * static_cast<size_t>(side));
        guidance::filter_kernel(drawn, crop, small, side, kernel.data());
        const Crop decoded{image.get(), height, width};
        const ViewSize size{sizes[2], sizes[3]};
        make_plain_view(decoded, size, view.get());
        const ViewSize working{static_cast<size_t>(small.height), static_cast<size_t>(small.width)};
        make_warped_view(decoded, {working, size_t(side), kernel.data(), map_x.data(), map_y.data()}, size, view.get());
        bool inside = true;
        for (size_t i = 0; i < pixels; ++i) {
            inside &= map_x.data()[i] >= 0 && map_x.data()[i] <= small.width - 1;
            inside &= map_y.data()[i] >= 0 && map_y.data()[i] <= small.height - 1;
        }
        std::printf("%d\n", inside);
    }
}

const std::map<std::string, void (*)(const Arguments&)> kTargets{{"probe", probe}, {"lmdb", lmdb}, {"views", views}};

}  // namespace

int main(int count, char** arguments) {
    if (count < 2 || !kTargets.count(arguments[1])) {
        std::fprintf(stderr, "which part?\n");
        return 2;
    }
    try {
        kTargets.at(arguments[1])(Arguments(arguments + 2, arguments + count));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
