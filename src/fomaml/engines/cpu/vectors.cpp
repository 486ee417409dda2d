// What a stack of tasks does to all its parameters at once: one call instead of one for each tensor.
#include <algorithm>
#include <cstddef>

#include "crew.h"
#include "entries.h"

namespace {

constexpr long long PART = 4096;  // numbers of a vector that one thread takes at a time: they stay in its first cache

// body(tensor, begin, end) over all parts of all vectors
template <typename Body>
void over_parts(const long long* lengths, long long tensors, const Body& body) {
    long long most = 0;
    for (long long i = 0; i < tensors; ++i) most = std::max(most, lengths[i]);
    const long long parts = (most + PART - 1) / PART;
    crew::share(tensors * parts, [&](std::ptrdiff_t number) {
        const long long tensor = number / parts, begin = number % parts * PART;
        if (begin < lengths[tensor]) body(tensor, begin, std::min(begin + PART, lengths[tensor]));
    });
}

template <typename T>
void sums(const T* const* from, T* const* to, const long long* lengths, long long tensors, long long tasks) {
    over_parts(lengths, tensors, [=](long long i, long long begin, long long end) {
        T* __restrict out = to[i];
        for (long long k = begin; k < end; ++k) out[k] = from[i][k];
        for (long long t = 1; t < tasks; ++t) {
            const T* __restrict in = from[i] + t * lengths[i];
            for (long long k = begin; k < end; ++k) out[k] += in[k];
        }
    });
}

// to = left - scale · right; left of each task, or with a step of 0 of all
template <typename T>
void subtract(const T* const* left, const T* const* right, T* const* to, const long long* lengths, const long long* steps,
              long long tensors, long long tasks, double scale) {
    const T by = static_cast<T>(scale);
    over_parts(lengths, tensors, [=](long long i, long long begin, long long end) {
        for (long long t = 0; t < tasks; ++t) {
            const T* __restrict a = left[i] + t * steps[i];
            const T* __restrict b = right[i] + t * lengths[i];
            T* __restrict out = to[i] + t * lengths[i];
            for (long long k = begin; k < end; ++k) out[k] = a[k] - by * b[k];
        }
    });
}

}  // namespace

#define ENTRY(NAME, T)                                                                                                 \
    extern "C" void sums_##NAME(const T* const* from, T* const* to, const long long* lengths, long long tensors,       \
                                long long tasks) {                                                                     \
        sums<T>(from, to, lengths, tensors, tasks);                                                                    \
    }                                                                                                                  \
    extern "C" void subtract_##NAME(const T* const* left, const T* const* right, T* const* to,                         \
                                    const long long* lengths, const long long* steps, long long tensors,               \
                                    long long tasks, double scale) {                                                   \
        subtract<T>(left, right, to, lengths, steps, tensors, tasks, scale);                                           \
    }

ENTRIES
