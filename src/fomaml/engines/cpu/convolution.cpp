// Convolutions of few small images, task by task, as matrix products without a copy of the patches.
//
// Images lie channels-last, x[image][row][column][channel], and weights w[out][row][column][in]: in a padded image each
// row of a patch is then one run of numbers, and so is the same row of each weight. Every product is made of tiles that
// stay in registers. For a few small images this is up to four times as fast as convolutions that set themselves up
// at each call (docs/LOG.md). Tasks are shared out among threads, each with its own scratch; where there are fewer tasks
// than threads, the columns of what a task gives are: every number is the same sum however they are shared out.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "crew.h"
#include "entries.h"
#include "patches.h"
#include "tiles.h"

namespace {

// from begin to end
struct Range {
    Size begin, end;
};

// one of some equal parts of columns, whole vectors each
inline Range part_of(Size columns, Size part, Size parts, Size vector) {
    const Size vectors = (columns + vector - 1) / vector;
    return {std::min(columns, vectors * part / parts * vector), std::min(columns, vectors * (part + 1) / parts * vector)};
}

// into how many parts each task goes
inline Size parts_for(Size tasks) { return std::max<Size>(1, crew::hands / tasks); }

constexpr int DOWN = 4, ACROSS = REGISTERS / 8;  // of a tile of dot products; it fills half of the registers

// outputs[pixel][out] = bias + patch · weight, in tiles of dot products
template <typename T>
void forward_wide(const T* padded, const std::vector<Size>& at, const T* w, const T* bias, T* y, const Shape& s,
                  Range own) {
    using V = typename Lanes<T>::V;
    constexpr int L = Lanes<T>::L;
    const Size pixels = s.pixels(), run = s.run(), patch = s.patch();
    for (Size p = 0; p < pixels; p += DOWN) {
        const T* a[DOWN];
        for (int r = 0; r < DOWN; ++r) a[r] = padded + at[std::min(p + r, pixels - 1)];
        for (Size o = own.begin; o < own.end; o += ACROSS) {
            const T* b[ACROSS];
            for (int c = 0; c < ACROSS; ++c) b[c] = w + std::min(o + c, own.end - 1) * patch;
            V acc[DOWN * ACROSS] = {};
            for (Size i = 0; i < s.rows; ++i) {
                const Size from = i * s.line(), with = i * run;
                for (Size k = 0; k < run; k += L) {
                    V left[DOWN], right[ACROSS];
#pragma GCC unroll 4
                    for (int r = 0; r < DOWN; ++r) left[r] = *reinterpret_cast<const V*>(a[r] + from + k);
#pragma GCC unroll 4
                    for (int c = 0; c < ACROSS; ++c) right[c] = *reinterpret_cast<const V*>(b[c] + with + k);
#pragma GCC unroll 4
                    for (int r = 0; r < DOWN; ++r)
#pragma GCC unroll 4
                        for (int c = 0; c < ACROSS; ++c) acc[ACROSS * r + c] += left[r] * right[c];
                }
            }
            T found[DOWN * ACROSS];
#pragma GCC unroll 4
            for (int g = 0; g < DOWN * ACROSS; g += L) {
                const V sum = sums<T>(acc + g);
                std::memcpy(found + g, &sum, sizeof sum);
            }
            const Size rows = std::min<Size>(DOWN, pixels - p), columns = std::min<Size>(ACROSS, own.end - o);
            for (Size r = 0; r < rows; ++r)
                for (Size c = 0; c < columns; ++c)
                    y[(p + r) * s.outputs + o + c] = found[ACROSS * r + c] + (bias ? bias[o + c] : T(0));
        }
    }
}

// the derivatives by the images: each pixel gathers from the outputs whose patches it is in
template <typename T>
void by_images(const T* slope, const T* w, const std::vector<Reached>& classes, T* by_x, const Shape& s, Size part,
               Size parts) {
    using V = typename Lanes<T>::V;
    constexpr int L = Lanes<T>::L;
    static thread_local std::vector<T> nothing;
    nothing.assign(s.outputs, T(0));
    for (const Reached& own : classes) {
        const Size count = own.pixels.size();
        const Range pixels = part_of(count, part, parts, ROWS);
        over_columns<T>(s.channels, [&](Size c, auto vectors) {
            constexpr int N = decltype(vectors)::value;
            const auto to = [&](Size p) { return by_x + own.pixels[p] * s.channels + c; };
            if (own.weights.empty())
                for (Size p = pixels.begin; p < pixels.end; ++p) std::fill(to(p), to(p) + N * L, T(0));
            // one part of the weights after the other, which then stays near, and not one pixel after the other
            for (std::size_t k = 0; k < own.weights.size(); ++k) {
                const T* from = w + own.weights[k] + c;
                for (Size p = pixels.begin; p < pixels.end; p += ROWS) {
                    const Size rows = std::min<Size>(ROWS, pixels.end - p);
                    V acc[ROWS][N] = {};
                    const T* a[ROWS];
                    for (int r = 0; r < ROWS; ++r) {
                        const Size source = own.sources[k * count + std::min(p + r, count - 1)];
                        a[r] = source < 0 ? nothing.data() : slope + source * s.outputs;
                    }
                    if (k) load<T, N>([=](Size r) { return to(p + r); }, rows, acc);
                    outer<T, N>(a, 1, s.outputs, [=](Size o) { return from + o * s.patch(); }, acc);
                    store<T, N>([=](Size r) { return to(p + r); }, rows, acc);
                }
            }
        });
    }
}

constexpr Size NEAR = 64;  // pixels

// the derivatives by the weights: sums over pixels of slope ⊗ patch, over so many at a time that they stay near
template <typename T>
void by_weights(const T* slope, const T* padded, const std::vector<Size>& at, T* by_w, const Shape& s, Range own) {
    using V = typename Lanes<T>::V;
    for (Size begin = 0; begin < s.pixels(); begin += NEAR) {
        const Size* place = at.data() + begin;
        const Size count = std::min(NEAR, s.pixels() - begin);
        for (Size i = 0; i < s.rows; ++i)
            over_columns<T>(s.run(), [&](Size c, auto vectors) {
                constexpr int N = decltype(vectors)::value;
                const T* from = padded + i * s.line() + c;
                for (Size o = own.begin; o < own.end; o += ROWS) {
                    const Size rows = std::min<Size>(ROWS, own.end - o);
                    const T* a[ROWS];
                    for (int r = 0; r < ROWS; ++r) a[r] = slope + begin * s.outputs + std::min(o + r, own.end - 1);
                    const auto to = [=](Size r) { return by_w + (o + r) * s.patch() + i * s.run() + c; };
                    V acc[ROWS][N] = {};
                    if (begin) load<T, N>(to, rows, acc);
                    outer<T, N>(a, s.outputs, count, [=](Size p) { return from + place[p]; }, acc);
                    store<T, N>(to, rows, acc);
                }
            });
    }
}

// outputs[pixel][out] = bias + patch · turned weights, vectors along the outputs
template <typename T>
void forward_turned(const T* padded, const std::vector<Size>& at, const T* turned, const T* bias, T* y,
                    const Shape& s, Range own) {
    using V = typename Lanes<T>::V;
    constexpr int L = Lanes<T>::L;
    const Size pixels = s.pixels(), run = s.run();
    const auto columns = [&](Size c, auto vectors) {
        constexpr int N = decltype(vectors)::value;
        for (Size p = 0; p < pixels; p += ROWS) {
            const T* a[ROWS];
            for (int r = 0; r < ROWS; ++r) a[r] = padded + at[std::min(p + r, pixels - 1)];
            V acc[ROWS][N];
            for (int v = 0; v < N; ++v)
                for (int r = 0; r < ROWS; ++r)
                    acc[r][v] = bias ? *reinterpret_cast<const V*>(bias + c + v * L) : V{};
            for (Size i = 0; i < s.rows; ++i) {
                const T* from = turned + i * run * s.outputs + c;
                outer<T, N>(a, 1, run, [=](Size k) { return from + k * s.outputs; }, acc);
                for (int r = 0; r < ROWS; ++r) a[r] += s.line();
            }
            for (int r = 0; r < ROWS && p + r < pixels; ++r)
                for (int v = 0; v < N; ++v) *reinterpret_cast<V*>(y + (p + r) * s.outputs + c + v * L) = acc[r][v];
        }
    };
    over_columns<T>(own.end, columns, own.begin);
}

template <typename T>
void by_weights_narrow(const T* slope, const T* patch, T* by_w, const Shape& s, Range own) {
    using V = typename Lanes<T>::V;
    constexpr int L = Lanes<T>::L;
    const Size length = s.patch();
    const auto columns = [&](Size c, auto vectors) {
        constexpr int N = decltype(vectors)::value;
        for (Size k = 0; k < length; k += ROWS) {
            const T* a[ROWS];
            for (int r = 0; r < ROWS; ++r) a[r] = patch + std::min(k + r, length - 1);
            V acc[ROWS][N] = {};
            outer<T, N>(a, length, s.pixels(), [=](Size p) { return slope + p * s.outputs + c; }, acc);
            for (int r = 0; r < ROWS && k + r < length; ++r)
                for (int v = 0; v < N; ++v)
                    for (int l = 0; l < L; ++l) by_w[(c + v * L + l) * length + k + r] = acc[r][v][l];
        }
    };
    over_columns<T>(own.end, columns, own.begin);
}

constexpr Size MANY = 50;  // pixels of a task from which on turning its weights pays: 80 take half of the time on an AMD EPYC

template <typename T>
void forward(const T* x, const T* w, const T* bias, T* y, Size tasks, Size w_step, Size bias_step, const Shape& s,
             bool narrow) {
    std::vector<T> common;
    std::vector<Size> at;
    places(s, at);
    const bool turns = narrow || (s.outputs % Lanes<T>::L == 0 && (s.pixels() >= MANY || !w_step));
    if (turns && !w_step) turn(w, common, s, 0, s.outputs);
    const Size parts = parts_for(tasks);
    crew::share(tasks * parts, [&](Size number) {
        const Size t = number / parts;
        const Range columns = part_of(s.outputs, number % parts, parts, Lanes<T>::L);
        if (columns.begin == columns.end) return;
        static thread_local std::vector<T> padded, own_turned;
        pad(x + t * s.images * s.height * s.width * s.channels, s, padded);
        const T* own = bias ? bias + t * bias_step : nullptr;
        T* to = y + t * s.pixels() * s.outputs;
        if (turns) {
            if (w_step) turn(w + t * w_step, own_turned, s, columns.begin, columns.end);
            forward_turned(padded.data(), at, w_step ? own_turned.data() : common.data(), own, to, s, columns);
        } else {
            forward_wide(padded.data(), at, w + t * w_step, own, to, s, columns);
        }
    });
}

template <typename T>
void backward(const T* slope, const T* x, const T* w, T* by_x, T* by_w, T* by_bias, Size tasks, Size w_step,
              const Shape& s, bool narrow) {
    std::vector<Size> at;
    places(s, at);
    const Size image = s.height * s.width * s.channels, pixels = s.pixels();
    std::vector<Reached> classes;
    if (by_x) reached(s, classes);
    const Size parts = parts_for(tasks);
    crew::share(tasks * parts, [&](Size number) {
        const Size t = number / parts, part = number % parts;
        const Range columns = part_of(s.outputs, part, parts, Lanes<T>::L);
        static thread_local std::vector<T> padded, copied;
        const T* g = slope + t * pixels * s.outputs;
        if (by_w && columns.begin < columns.end) {
            pad(x + t * s.images * image, s, padded);
            T* to = by_w + t * s.outputs * s.patch();
            if (narrow) {
                patches(padded.data(), at, copied, s);
                by_weights_narrow(g, copied.data(), to, s, columns);
            } else {
                by_weights(g, padded.data(), at, to, s, columns);
            }
        }
        if (by_bias) {
            T* to = by_bias + t * s.outputs;
            std::fill(to + columns.begin, to + columns.end, T(0));
            for (Size p = 0; p < pixels; ++p)
#pragma omp simd
                for (Size o = columns.begin; o < columns.end; ++o) to[o] += g[p * s.outputs + o];
        }
        if (by_x) by_images(g, w + t * w_step, classes, by_x + t * s.images * image, s, part, parts);
    });
}

}  // namespace

#define ENTRY(NAME, T)                                                                                             \
    extern "C" void convolve_##NAME(const T* x, const T* w, const T* bias, T* y, const long long* sizes) {         \
        const Shape s{sizes[4], sizes[5], sizes[6], sizes[7], sizes[8], sizes[9], sizes[10], sizes[11], sizes[12], \
                      sizes[13], sizes[14]};                                                                       \
        forward<T>(x, w, bias, y, sizes[0], sizes[1], sizes[2], s, sizes[3]);                                      \
    }                                                                                                              \
    extern "C" void convolve_backward_##NAME(const T* slope, const T* x, const T* w, T* by_x, T* by_w, T* by_bias, \
                                             const long long* sizes) {                                             \
        const Shape s{sizes[4], sizes[5], sizes[6], sizes[7], sizes[8], sizes[9], sizes[10], sizes[11], sizes[12], \
                      sizes[13], sizes[14]};                                                                       \
        backward<T>(slope, x, w, by_x, by_w, by_bias, sizes[0], sizes[1], s, sizes[3]);                            \
    }

ENTRIES
