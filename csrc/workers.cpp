#include "workers.h"

#include <unistd.h>

#include <algorithm>

namespace lmim {

Workers::Workers(size_t threads) : process_(getpid()) {
    for (size_t i = 1; i < threads; ++i) team_.emplace_back([this] { serve(); });
}

Workers::~Workers() {
    if (getpid() != process_) {  // the threads stayed with the parent
        for (std::thread& thread : team_) thread.detach();
        return;
    }
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;
    }
    started_.notify_all();
    for (std::thread& thread : team_) thread.join();
}

void Workers::run(size_t count, size_t grain, const Work& work) {
    grain = std::max<size_t>(grain, 1);
    std::unique_lock<std::mutex> caller(caller_, std::defer_lock);
    if (count <= grain || team_.empty() || getpid() != process_ || !caller.try_lock()) {
        for (size_t begin = 0; begin < count; begin += grain) work(begin, std::min(count, begin + grain));
        return;
    }
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        count_ = count;
        grain_ = grain;
        work_ = &work;
        error_ = nullptr;
        working_ = team_.size();
        next_.store(0);
        ++round_;
    }
    started_.notify_all();
    take_pieces();
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return working_ == 0; });
    if (error_) std::rethrow_exception(error_);
}

void Workers::serve() {
    size_t seen = 0;
    while (true) {
        {
            std::unique_lock<std::mutex> lock(mutex_);
            started_.wait(lock, [&] { return closed_ || round_ != seen; });
            if (closed_) return;
            seen = round_;
        }
        take_pieces();
        const std::lock_guard<std::mutex> lock(mutex_);
        if (--working_ == 0) finished_.notify_one();
    }
}

void Workers::take_pieces() {
    try {
        for (size_t begin; (begin = next_.fetch_add(grain_)) < count_;)
            (*work_)(begin, std::min(count_, begin + grain_));
    } catch (...) {
        next_.store(count_);  // the others stop, too
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
    }
}

}  // namespace lmim
