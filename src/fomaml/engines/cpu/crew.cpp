// The threads of crew.h, which wait awake for a moment. Here alone are the headers of the standard library that they need.
#include "crew.h"

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace crew {

thread_local std::ptrdiff_t hands = 1;

namespace {

class Crew {
  public:
    bool run(std::ptrdiff_t helpers, void (*work)(void*), void* context) {
        if (!free_.try_lock()) return false;
        work_ = work, context_ = context, wanted_ = helpers;
        try {
            for (; hired_ < helpers; ++hired_) std::thread(&Crew::help, this, hired_).detach();
        } catch (const std::system_error&) {  // no more threads to be had: fewer hands then
        }
        open_ = true;
        {
            std::lock_guard<std::mutex> guard(lock_);
            ++jobs_;
        }
        wake_.notify_all();
        work(context);
        open_ = false;
        while (busy_) pause();
        free_.unlock();
        return true;
    }

  private:
    void help(std::ptrdiff_t number) {
        unsigned long seen = 0;
        for (;;) {
            await(seen);
            seen = jobs_;
            ++busy_;  // first this and then a look at open_: run() does it the other way round
            if (open_ && number < wanted_) work_(context_);
            --busy_;
        }
    }

    void await(unsigned long seen) {
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
        do {
            for (int i = 0; i < 50; ++i) {
                if (jobs_ != seen) return;
                pause();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> guard(lock_);
        wake_.wait(guard, [&] { return jobs_ != seen; });
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#else
        std::this_thread::yield();
#endif
    }

    std::mutex free_, lock_;
    std::condition_variable wake_;
    std::atomic<unsigned long> jobs_{0};
    std::atomic<long> busy_{0};
    std::atomic<bool> open_{false};
    void (*work_)(void*) = nullptr;
    void* context_ = nullptr;
    std::ptrdiff_t wanted_ = 0, hired_ = 0;
};

// Never destroyed, as its threads never end; a child process has none of them and makes its own.
Crew& mine() {
    static std::mutex lock;
    static Crew* crew = nullptr;
    static pid_t process = 0;
    std::lock_guard<std::mutex> guard(lock);
    if (process != getpid()) crew = new Crew, process = getpid();
    return *crew;
}

}  // namespace

bool run(std::ptrdiff_t helpers, void (*work)(void*), void* context) { return mine().run(helpers, work, context); }

}  // namespace crew

// the threads that the caller's kernels may use from now on
extern "C" void use_threads(long long threads) { crew::hands = threads; }
