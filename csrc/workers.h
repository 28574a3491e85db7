// A team of threads that share the items of a batch. No Python in here.

#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace lmim {

// The caller of `run` is one of the threads. Which thread does which items is left to chance: work on an item must
// not depend on the others.
class Workers {
public:
    using Work = std::function<void(size_t begin, size_t end)>;

    explicit Workers(size_t threads);
    ~Workers();
    Workers(const Workers&) = delete;
    Workers& operator=(const Workers&) = delete;

    size_t threads() const { return team_.size() + 1; }

    // Calls work(begin, end) for pieces of at most `grain` items that cover 0 .. count - 1, and returns when all are
    // done. The first exception of the work is thrown again here. While the team is busy for another caller, and in
    // a forked child, which has no team, the caller does all of it.
    void run(size_t count, size_t grain, const Work& work);

private:
    void serve();
    void take_pieces();

    std::vector<std::thread> team_;
    const pid_t process_;
    std::mutex caller_;  // one `run` at a time has the team
    std::mutex mutex_;   // of all below but `next_`
    std::condition_variable started_, finished_;
    size_t round_ = 0, working_ = 0;
    bool closed_ = false;
    size_t count_ = 0, grain_ = 1;
    const Work* work_ = nullptr;
    std::exception_ptr error_;
    std::atomic<size_t> next_{0};
};

}  // namespace lmim
