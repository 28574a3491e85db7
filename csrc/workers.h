// A team of threads that share the items of a batch. No Python in here.

#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace lmim {

// The caller of `run` is one of the threads. Which thread does which items is left to chance: work on an item must
// not depend on the others.
class Workers {
public:
    using Work = std::function<void(size_t begin, size_t end)>;

    explicit Workers(size_t threads);  // std::system_error if the system has no more threads
    ~Workers();
    Workers(const Workers&) = delete;
    Workers& operator=(const Workers&) = delete;

    size_t threads() const;

    // Calls work(begin, end) for pieces of at most `grain` items that cover 0 .. count - 1, and returns when all are
    // done. The first exception of the work is thrown again here. While the team is busy for another caller, and in
    // a forked child, which has no team, the caller does all of it.
    void run(size_t count, size_t grain, const Work& work);

private:
    struct Team;
    static void serve(Team& team);
    static void take_pieces(Team& team);
    void close();

    std::unique_ptr<Team> team_;
};

}  // namespace lmim
