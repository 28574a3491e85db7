#include "workers.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace lmim {

struct Workers::Team {
    std::vector<std::thread> threads;
    const pid_t process = getpid();
    std::mutex caller;  // one `run` at a time has the team
    std::mutex mutex;   // of all below but `next`
    std::condition_variable started, finished;
    size_t round = 0, working = 0;
    bool closed = false;
    size_t count = 0, grain = 1;
    const Work* work = nullptr;
    std::exception_ptr error;
    std::atomic<size_t> next{0};
};

Workers::Workers(size_t threads) : team_(std::make_unique<Team>()) {
    try {
        for (size_t i = 1; i < threads; ++i) team_->threads.emplace_back([&team = *team_] { serve(team); });
    } catch (...) {  // no more threads: those that wait already must not outlive the team
        close();
        throw;
    }
}

Workers::~Workers() {
    if (getpid() != team_->process) {
        team_.release();  // the threads stayed with the parent, and what they wait for cannot be destroyed
        return;
    }
    close();
}

void Workers::close() {
    {
        const std::lock_guard<std::mutex> lock(team_->mutex);
        team_->closed = true;
    }
    team_->started.notify_all();
    for (std::thread& thread : team_->threads) thread.join();
}

size_t Workers::threads() const { return team_->threads.size() + 1; }

void Workers::run(size_t count, size_t grain, const Work& work) {
    Team& team = *team_;
    grain = std::max<size_t>(grain, 1);
    std::unique_lock<std::mutex> caller(team.caller, std::defer_lock);
    if (count <= grain || team.threads.empty() || getpid() != team.process || !caller.try_lock()) {
        for (size_t begin = 0; begin < count; begin += grain) work(begin, std::min(count, begin + grain));
        return;
    }
    {
        const std::lock_guard<std::mutex> lock(team.mutex);
        team.count = count;
        team.grain = grain;
        team.work = &work;
        team.error = nullptr;
        team.working = team.threads.size();
        team.next.store(0);
        ++team.round;
    }
    team.started.notify_all();
    take_pieces(team);
    std::unique_lock<std::mutex> lock(team.mutex);
    team.finished.wait(lock, [&team] { return team.working == 0; });
    if (team.error) std::rethrow_exception(team.error);
}

void Workers::serve(Team& team) {
    size_t seen = 0;
    while (true) {
        {
            std::unique_lock<std::mutex> lock(team.mutex);
            team.started.wait(lock, [&] { return team.closed || team.round != seen; });
            if (team.closed) return;
            seen = team.round;
        }
        take_pieces(team);
        const std::lock_guard<std::mutex> lock(team.mutex);
        if (--team.working == 0) team.finished.notify_one();
    }
}

void Workers::take_pieces(Team& team) {
    try {
        for (size_t begin; (begin = team.next.fetch_add(team.grain)) < team.count;)
            (*team.work)(begin, std::min(team.count, begin + team.grain));
    } catch (...) {
        team.next.store(team.count);  // the others stop, too
        const std::lock_guard<std::mutex> lock(team.mutex);
        if (!team.error) team.error = std::current_exception();
    }
}

}  // namespace lmim
