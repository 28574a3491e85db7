// The native form of lmim_fast/data/store/image_headers.py.
//
// The two files have the same functions and give the same results: change them together.
// Sources: ITU T.81 (JPEG), W3C PNG, BITMAPINFOHEADER, GIF89a, RFC 9649 (WebP).

#include "image_headers.h"

#include <cstring>
#include <string_view>

namespace lmim {
namespace {

// Bytes read with a check: beyond the end, the image is truncated. Positions and counts stay far below 2^64: they are
// sums of a place inside the data, 32-bit lengths and at most 4 bytes for each of max_pixels.
class Reader {
public:
    Reader(const uint8_t* data, size_t size) : data_(data), size_(size) {}

    uint64_t size() const { return size_; }

    bool starts_with(std::string_view text, uint64_t at = 0) const {
        return inside(at, text.size()) && std::memcmp(data_ + at, text.data(), text.size()) == 0;
    }

    void need(uint64_t at, uint64_t count) const {
        if (!inside(at, count)) throw Verdict{Status::TRUNCATED};
    }

    uint64_t find_ff(uint64_t at) const {
        need(at, 1);
        const void* found = std::memchr(data_ + at, 0xFF, size_ - at);
        if (found == nullptr) throw Verdict{Status::TRUNCATED};
        return static_cast<uint64_t>(static_cast<const uint8_t*>(found) - data_);
    }

    uint64_t little(uint64_t at, uint64_t count) const {
        need(at, count);
        uint64_t value = 0;
        for (uint64_t i = count; i-- > 0;) value = value << 8 | data_[at + i];
        return value;
    }

    uint64_t big(uint64_t at, uint64_t count) const {
        need(at, count);
        uint64_t value = 0;
        for (uint64_t i = 0; i < count; ++i) value = value << 8 | data_[at + i];
        return value;
    }

private:
    bool inside(uint64_t at, uint64_t count) const { return at <= size_ && count <= size_ - at; }

    const uint8_t* data_;
    uint64_t size_;
};

[[noreturn]] void invalid() { throw Verdict{Status::INVALID}; }

Size checked(uint64_t height, uint64_t width, uint64_t max_pixels) {
    if (height == 0 || width == 0) invalid();
    if (height * width > max_pixels) throw Verdict{Status::TOO_LARGE, {height, width}};
    return {height, width};
}

Size jpeg_frame(const Reader& image, uint64_t at, uint64_t length, uint64_t marker, uint64_t max_pixels) {
    const uint64_t precision = image.big(at + 2, 1), components = image.big(at + 7, 1);
    if (length != 8 + 3 * components) invalid();
    // baseline, extended, progressive, and the arithmetic-coded forms of the last two
    const bool known = marker == 0xC0 || marker == 0xC1 || marker == 0xC2 || marker == 0xC9 || marker == 0xCA;
    if (!known || precision != 8 || !(components == 1 || components == 3 || components == 4))
        throw Verdict{Status::UNSUPPORTED};
    for (uint64_t i = 0; i < components; ++i) {
        const uint64_t sampling = image.big(at + 9 + 3 * i, 1), across = sampling >> 4, down = sampling & 15;
        if (across < 1 || across > 4 || down < 1 || down > 4) invalid();
    }
    return checked(image.big(at + 3, 2), image.big(at + 5, 2), max_pixels);
}

// Walks the markers to the end of the image; what follows it is ignored, as decoders do. Up to the first scan,
// segment must follow segment: libjpeg would search for the next one, DALI's parser refuses the file.
Size jpeg(const Reader& image, uint64_t max_pixels) {
    Size size{0, 0};
    bool framed = false, scanned = false;
    uint64_t at = 2;
    while (true) {
        if (scanned) at = image.find_ff(at);
        if (image.big(at, 1) != 0xFF) invalid();
        while (image.big(at, 1) == 0xFF) ++at;
        const uint64_t marker = image.big(at, 1);
        ++at;
        if (marker <= 1 || (marker >= 0xD0 && marker <= 0xD7)) {  // stuffed byte, TEM, restart: no segment
            if (!scanned) invalid();
            continue;
        }
        if (marker == 0xD8) invalid();
        if (marker == 0xD9) {  // end of image
            if (!framed || !scanned) invalid();
            return size;
        }
        const uint64_t length = image.big(at, 2);
        if (length < 2) invalid();
        if (marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC) {  // start of frame
            if (framed) invalid();
            size = jpeg_frame(image, at, length, marker, max_pixels);
            framed = true;
        }
        if (marker == 0xDA) {  // start of scan
            if (!framed) invalid();
            scanned = true;
        }
        image.need(at, length);
        at += length;
    }
}

bool png_depth_allowed(uint64_t colour, uint64_t depth) {
    switch (colour) {
        case 0: return depth == 1 || depth == 2 || depth == 4 || depth == 8 || depth == 16;
        case 3: return depth == 1 || depth == 2 || depth == 4 || depth == 8;
        case 2:
        case 4:
        case 6: return depth == 8 || depth == 16;
        default: return false;
    }
}

Size png(const Reader& image, uint64_t max_pixels) {
    image.need(8, 25);
    if (image.big(8, 4) != 13 || !image.starts_with("IHDR", 12)) invalid();
    const uint64_t width = image.big(16, 4), height = image.big(20, 4);
    const uint64_t depth = image.big(24, 1), colour = image.big(25, 1);
    if (width >= 1ull << 31 || height >= 1ull << 31 || !png_depth_allowed(colour, depth)) invalid();
    const uint64_t compression = image.big(26, 1), filtering = image.big(27, 1), interlace = image.big(28, 1);
    if (compression != 0 || filtering != 0 || interlace > 1) invalid();
    const Size size = checked(height, width, max_pixels);
    bool has_pixels = false;
    uint64_t at = 33;
    while (!image.starts_with("IEND", at + 4)) {
        const uint64_t length = image.big(at, 4);
        image.need(at, 12 + length);
        for (uint64_t i = 4; i < 8; ++i) {
            const uint64_t letter = image.big(at + i, 1) & 0xDF;
            if (letter < 65 || letter > 90) invalid();
        }
        has_pixels |= image.starts_with("IDAT", at + 4);
        at += 12 + length;
    }
    if (!has_pixels) invalid();
    image.need(at, 12);
    return size;
}

// Bytes of the colour table that the flags announce.
uint64_t gif_table(uint64_t flags) { return flags & 0x80 ? 3ull << ((flags & 7) + 1) : 0; }

// Walks the blocks to the trailer.
Size gif(const Reader& image, uint64_t max_pixels) {
    image.need(0, 13);
    const Size size = checked(image.little(8, 2), image.little(6, 2), max_pixels);
    uint64_t at = 13 + gif_table(image.little(10, 1));
    bool has_frame = false;
    while (true) {
        const uint64_t block = image.little(at, 1);
        if (block == 0x3B) {  // trailer
            if (!has_frame) invalid();
            return size;
        }
        if (block == 0x2C) {  // frame: position and size, flags, colour table, code size
            at += 11 + gif_table(image.little(at + 9, 1));
            has_frame = true;
        } else if (block == 0x21) {  // extension: label
            at += 2;
        } else {
            invalid();
        }
        while (const uint64_t length = image.little(at, 1)) at += 1 + length;
        at += 1;
    }
}

Size webp_extended(const Reader& image, uint64_t max_pixels) {
    if (image.little(16, 4) < 10) invalid();
    return checked(image.little(27, 3) + 1, image.little(24, 3) + 1, max_pixels);
}

Size webp_lossy(const Reader& image, uint64_t max_pixels) {
    const uint64_t tag = image.little(20, 3);
    const uint64_t inter_frame = tag & 1, profile = tag >> 1 & 7, shown = tag >> 4 & 1, partition = tag >> 5;
    if (inter_frame || profile > 3 || !shown || partition >= image.little(16, 4)) invalid();
    if (image.big(23, 3) != 0x9D012A) invalid();
    return checked(image.little(28, 2) & 0x3FFF, image.little(26, 2) & 0x3FFF, max_pixels);
}

Size webp_lossless(const Reader& image, uint64_t max_pixels) {
    const uint64_t bits = image.little(21, 4);
    if (image.little(20, 1) != 0x2F || bits >> 29 != 0) invalid();  // signature, version
    return checked((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, max_pixels);
}

Size webp(const Reader& image, uint64_t max_pixels) {
    image.need(0, 20);
    const uint64_t end = 8 + image.little(4, 4);
    image.need(0, end);
    Size size{0, 0};
    if (image.starts_with("VP8X", 12)) {
        size = webp_extended(image, max_pixels);
    } else if (image.starts_with("VP8 ", 12)) {
        size = webp_lossy(image, max_pixels);
    } else if (image.starts_with("VP8L", 12)) {
        size = webp_lossless(image, max_pixels);
    } else {
        invalid();
    }
    // DALI's parser refuses a file that announces EXIF data and has none.
    const bool announces_exif = image.starts_with("VP8X", 12) && (image.little(20, 1) & 8);
    bool has_pixels = false, has_exif = false;
    uint64_t at = 12;
    while (at + 8 <= end) {
        const uint64_t length = image.little(at + 4, 4);
        if (at + 8 + length > end) throw Verdict{Status::TRUNCATED};
        has_pixels |= image.starts_with("VP8 ", at) || image.starts_with("VP8L", at) || image.starts_with("ANMF", at);
        has_exif |= image.starts_with("EXIF", at);
        at += 8 + length + (length & 1);
    }
    if (!has_pixels || (announces_exif && !has_exif)) invalid();
    return size;
}

int64_t as_signed(uint64_t value) { return static_cast<int32_t>(static_cast<uint32_t>(value)); }

bool bmp_depth_allowed(uint64_t compression, uint64_t depth) {
    switch (compression) {
        case 0: return depth == 1 || depth == 4 || depth == 8 || depth == 16 || depth == 24 || depth == 32;
        case 1: return depth == 8;
        case 2: return depth == 4;
        default: return depth == 16 || depth == 32;
    }
}

Size bmp(const Reader& image, uint64_t max_pixels) {
    const uint64_t offset = image.little(10, 4), header = image.little(14, 4);
    int64_t width = 0, height = 0;
    uint64_t depth = 0, compression = 0;
    if (header == 12) {  // OS/2
        width = static_cast<int64_t>(image.little(18, 2));
        height = static_cast<int64_t>(image.little(20, 2));
        depth = image.little(24, 2);
    } else if (header >= 40 && header <= 124) {
        width = as_signed(image.little(18, 4));
        height = as_signed(image.little(22, 4));
        if (height < 0) height = -height;  // top-down
        depth = image.little(28, 2);
        compression = image.little(30, 4);
    } else {
        invalid();
    }
    if (width < 0 || height == 1ll << 31 || offset < 14 + header) invalid();
    if (compression > 3) throw Verdict{Status::UNSUPPORTED};
    if (!bmp_depth_allowed(compression, depth)) invalid();
    const Size size = checked(static_cast<uint64_t>(height), static_cast<uint64_t>(width), max_pixels);
    const bool run_length = compression == 1 || compression == 2;
    image.need(offset, run_length ? 1 : (size.width * depth + 31) / 32 * 4 * size.height);
    return size;
}

Size dispatch(const Reader& image, uint64_t max_pixels) {
    if (image.size() == 0) throw Verdict{Status::EMPTY};
    if (image.starts_with("\xff\xd8")) return jpeg(image, max_pixels);
    if (image.starts_with("\x89PNG\r\n\x1a\n")) return png(image, max_pixels);
    if (image.starts_with("GIF87a") || image.starts_with("GIF89a")) return gif(image, max_pixels);
    if (image.starts_with("RIFF") && image.starts_with("WEBP", 8)) return webp(image, max_pixels);
    if (image.starts_with("BM")) return bmp(image, max_pixels);
    throw Verdict{Status::NOT_AN_IMAGE};
}

}  // namespace

Verdict read_header(const uint8_t* data, size_t size, uint64_t max_pixels) {
    try {
        return {Status::OK, dispatch(Reader(data, size), max_pixels)};
    } catch (const Verdict& verdict) {
        return verdict;
    }
}

}  // namespace lmim
