// Tasks of a kernel shared out among threads that wait for the next kernel.
//
// A kernel of a stack of tasks takes some hundred microseconds, and one graph calls dozens, with a little of the
// interpreter between them: helpers stay awake for a moment before they sleep.
#pragma once

#include <atomic>
#include <cstddef>

namespace crew {

// the threads that kernels called by this thread may use, itself among them
extern thread_local std::ptrdiff_t hands;

// calls work(context) on `helpers` threads and on this one, until all are done; false if another thread is at it
bool run(std::ptrdiff_t helpers, void (*work)(void*), void* context);

// body(i) for all i below `number`, each once, on as many threads as the caller may use
template <typename Body>
void share(std::ptrdiff_t number, const Body& body) {
    struct Job {
        const Body& body;
        const std::ptrdiff_t number;
        std::atomic<std::ptrdiff_t> next;
    } job{body, number, {0}};
    const auto work = [](void* context) {
        Job& own = *static_cast<Job*>(context);
        for (std::ptrdiff_t i; (i = own.next++) < own.number;) own.body(i);
    };
    const std::ptrdiff_t helpers = (hands < number ? hands : number) - 1;
    if (helpers < 1 || !run(helpers, work, &job)) work(&job);
}

}  // namespace crew
