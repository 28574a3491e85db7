#include "gather.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <optional>
#include <string_view>

namespace lmim {
namespace {

constexpr size_t kGrain = 8;  // records that a thread takes at once: a cold one can take a millisecond

// The files' states at the start of a batch; those of other files are never looked at.
std::vector<LmdbFile::Snapshot> snapshots(const Wanted& wanted) {
    std::vector<LmdbFile::Snapshot> states(wanted.files.size());
    std::vector<bool> known(wanted.files.size());
    for (size_t i = 0; i < wanted.count; ++i) {
        const auto file = static_cast<size_t>(wanted.databases[i]);
        if (known[file]) continue;
        known[file] = true;
        try {
            states[file] = wanted.files[file]->snapshot();
        } catch (const std::runtime_error& error) {
            std::throw_with_nested(RecordUnreadable(i, error.what()));
        }
    }
    return states;
}

// Where a record's value lies, in a snapshot of its own if the batch's was written over.
struct Place {
    LmdbFile::Snapshot snapshot;
    LmdbFile::Value value;
};

LmdbFile::Value find(const LmdbFile& file, const LmdbFile::Snapshot& state, int64_t number) {
    char key[32];
    const int size = std::snprintf(key, sizeof key, "image-%09lld", static_cast<long long>(number));
    return file.find(state, {key, static_cast<size_t>(size)}).value_or(LmdbFile::Value{});
}

}  // namespace

Arena gather(const Wanted& wanted, const Images& images, uint64_t max_pixels, size_t rectangle_bytes,
             Workers& workers) {
    const std::vector<LmdbFile::Snapshot> states = snapshots(wanted);
    std::vector<Place> places(wanted.count);
    // Work on a record; its errors get its place in the batch.
    const auto for_each = [&](const auto& work) {
        workers.run(wanted.count, kGrain, [&](size_t begin, size_t end) {
            for (size_t i = begin; i < end; ++i) {
                try {
                    work(i, *wanted.files[static_cast<size_t>(wanted.databases[i])], places[i]);
                } catch (const std::runtime_error& error) {
                    std::throw_with_nested(RecordUnreadable(i, error.what()));
                }
            }
        });
    };

    for_each([&](size_t i, const LmdbFile& file, Place& place) {
        place.snapshot = states[static_cast<size_t>(wanted.databases[i])];
        file.in_one_snapshot(place.snapshot, [&](const LmdbFile::Snapshot& snapshot) {
            place.value = find(file, snapshot, wanted.numbers[i]);
        });
    });

    size_t total = 0, longest = 0;
    for (const Place& place : places) {
        total += place.value.length;
        longest = std::max<size_t>(longest, place.value.length);
    }
    Arena arena;
    const bool rectangle = longest > 0 && longest <= rectangle_bytes / wanted.count;
    arena.stride = rectangle ? longest : 0;
    arena.size = rectangle ? longest * wanted.count : total;
    arena.bytes.reset(new uint8_t[arena.size]);  // not set to zero
    for (size_t i = 0, next = 0; i < wanted.count; ++i) {
        images.offsets[i] = static_cast<int64_t>(next);
        images.lengths[i] = static_cast<int64_t>(places[i].value.length);
        next += rectangle ? longest : places[i].value.length;
    }

    for_each([&](size_t i, const LmdbFile& file, Place& place) {
        uint8_t* image = arena.bytes.get() + images.offsets[i];
        const uint64_t length = place.value.length, found_in = place.snapshot.transaction;
        file.in_one_snapshot(place.snapshot, [&](const LmdbFile::Snapshot& snapshot) {
            if (snapshot.transaction != found_in) place.value = find(file, snapshot, wanted.numbers[i]);
            if (place.value.length != length) throw LmdbDamaged("it was written anew while it was read");
            if (length > 0) file.read(snapshot, place.value, image);
        });
        const Verdict verdict = read_header(image, length, max_pixels);
        images.status[i] = static_cast<uint8_t>(verdict.status);
        images.heights[i] = static_cast<int32_t>(verdict.size.height);
        images.widths[i] = static_cast<int32_t>(verdict.size.width);
    });
    return arena;
}

std::vector<std::optional<std::string>> values(const LmdbFile& file, const std::vector<std::string>& keys) {
    std::vector<std::optional<std::string>> values(keys.size());
    std::optional<LmdbFile::Snapshot> state;
    for (size_t i = 0; i < keys.size(); ++i) {
        try {
            if (!state) state = file.snapshot();
            file.in_one_snapshot(*state, [&](const LmdbFile::Snapshot& snapshot) {
                values[i].reset();
                const std::optional<LmdbFile::Value> value = file.find(snapshot, keys[i]);
                if (!value) return;
                std::string& bytes = values[i].emplace(value->length, '\0');
                if (value->length > 0) file.read(snapshot, *value, reinterpret_cast<uint8_t*>(bytes.data()));
            });
        } catch (const std::runtime_error& error) {
            std::throw_with_nested(RecordUnreadable(i, error.what()));
        }
    }
    return values;
}

}  // namespace lmim
