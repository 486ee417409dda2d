// Batch norm by batch statistics, ReLU and, if asked for, a 2x2 max-pool, in as few passes over memory as there can be.
//
// Images lie channels-last: x[pixel * channels + channel]. Tasks are shared out among threads.
// by_x may be x itself: each element is read before it is written.
// forward saves, for backward, the input that won each pooling window, so that the sums of backward read a quarter.
#include <cstddef>
#include <vector>

#include "crew.h"
#include "entries.h"

namespace {

constexpr std::ptrdiff_t BLOCK = 64;  // pixels summed in T before they are added to a double

template <typename T>
struct Sums {  // two sums per channel
    std::vector<T> first, second;
    std::vector<double> total_first, total_second;
    std::ptrdiff_t pending = 0;

    explicit Sums(std::ptrdiff_t channels)
        : first(channels), second(channels), total_first(channels), total_second(channels) {}

    void pixel_done() {
        if (++pending == BLOCK) flush();
    }

    void flush() {
        for (std::size_t c = 0; c < first.size(); ++c) {
            total_first[c] += first[c];
            total_second[c] += second[c];
            first[c] = second[c] = 0;
        }
        pending = 0;
    }
};

// mean and reciprocal standard deviation of each channel; deviations are taken from the first pixel, so that
// a large mean does not cancel the variance
template <typename T>
void statistics(const T* x, std::ptrdiff_t pixels, std::ptrdiff_t channels, double eps, T* mean, T* rstd);

template <typename T>
void statistics(const T* __restrict x, std::ptrdiff_t pixels, std::ptrdiff_t channels, double eps,
                T* __restrict mean, T* __restrict rstd) {
    Sums<T> sums(channels);
    T* __restrict first = sums.first.data();
    T* __restrict second = sums.second.data();
    for (std::ptrdiff_t i = 0; i < pixels; ++i) {
        const T* __restrict row = x + i * channels;
#pragma omp simd
        for (std::ptrdiff_t c = 0; c < channels; ++c) {
            const T far = row[c] - x[c];
            first[c] += far;
            second[c] += far * far;
        }
        sums.pixel_done();
    }
    sums.flush();
#pragma omp simd
    for (std::ptrdiff_t c = 0; c < channels; ++c) {
        const double far = sums.total_first[c] / pixels;
        const double variance = sums.total_second[c] / pixels - far * far;
        mean[c] = static_cast<T>(x[c] + far);
        rstd[c] = static_cast<T>(1.0 / __builtin_sqrt((variance > 0 ? variance : variance == variance ? 0 : variance) + eps));
    }
}

template <typename T>
void affine(const T* gamma, const T* beta, const T* mean, const T* rstd, std::ptrdiff_t channels, std::vector<T>& scale,
            std::vector<T>& shift) {
#pragma omp simd
    for (std::ptrdiff_t c = 0; c < channels; ++c) {
        scale[c] = (gamma ? gamma[c] : T(1)) * rstd[c];
        shift[c] = (beta ? beta[c] : T(0)) - mean[c] * scale[c];
    }
}

template <typename T>
void forward(const T* x, const T* gamma, const T* beta, T* y, T* peak, T* mean, T* rstd, std::ptrdiff_t images,
             std::ptrdiff_t height, std::ptrdiff_t width, std::ptrdiff_t channels, double eps, int pool) {
    statistics(x, images * height * width, channels, eps, mean, rstd);
    std::vector<T> scales(channels), shifts(channels);
    affine(gamma, beta, mean, rstd, channels, scales, shifts);
    const T* __restrict scale = scales.data();
    const T* __restrict shift = shifts.data();
    if (!pool) {
        for (std::ptrdiff_t i = 0; i < images * height * width; ++i) {
            const T* __restrict in = x + i * channels;
            T* __restrict out = y + i * channels;
#pragma omp simd
            for (std::ptrdiff_t c = 0; c < channels; ++c) {
                const T z = scale[c] * in[c] + shift[c];
                out[c] = z <= 0 ? T(0) : z;  // not a number stays so
            }
        }
        return;
    }
    const std::ptrdiff_t rows = height / 2, columns = width / 2;
    for (std::ptrdiff_t n = 0; n < images; ++n)
        for (std::ptrdiff_t i = 0; i < rows; ++i)
            for (std::ptrdiff_t j = 0; j < columns; ++j) {
                const T* __restrict a = x + ((n * height + 2 * i) * width + 2 * j) * channels;
                const T* __restrict b = a + channels;
                const T* __restrict d = a + width * channels;
                const T* __restrict e = d + channels;
                const std::ptrdiff_t to = ((n * rows + i) * columns + j) * channels;
                T* __restrict out = y + to;
                T* __restrict won = peak + to;
#pragma omp simd
                for (std::ptrdiff_t c = 0; c < channels; ++c) {
                    T best = scale[c] * a[c] + shift[c], from = a[c];
                    T z = scale[c] * b[c] + shift[c];
                    bool more = z > best || z != z;
                    from = more ? b[c] : from, best = more ? z : best;
                    z = scale[c] * d[c] + shift[c];
                    more = z > best || z != z;
                    from = more ? d[c] : from, best = more ? z : best;
                    z = scale[c] * e[c] + shift[c];
                    more = z > best || z != z;
                    from = more ? e[c] : from, best = more ? z : best;
                    out[c] = best <= 0 ? T(0) : best;
                    won[c] = from;
                }
            }
}

template <typename T>
void backward(const T* slope, const T* x, const T* y, const T* peak, const T* gamma, const T* mean, const T* rstd,
              T* by_x, T* by_gamma, T* by_beta, std::ptrdiff_t images, std::ptrdiff_t height, std::ptrdiff_t width,
              std::ptrdiff_t channels, int pool) {
    const std::ptrdiff_t rows = pool ? height / 2 : height, columns = pool ? width / 2 : width;
    const T* winners = pool ? peak : x;
    Sums<T> sums(channels);
    T* __restrict first = sums.first.data();
    T* __restrict second = sums.second.data();
    for (std::ptrdiff_t i = 0; i < images * rows * columns; ++i) {
        const T* __restrict g = slope + i * channels;
        const T* __restrict out = y + i * channels;
        const T* __restrict in = winners + i * channels;
#pragma omp simd
        for (std::ptrdiff_t c = 0; c < channels; ++c) {
            const T passed = out[c] <= 0 ? T(0) : g[c];
            first[c] += passed;
            second[c] += passed * (in[c] - mean[c]);
        }
        sums.pixel_done();
    }
    sums.flush();
    std::vector<T> slopes(channels), tilts(channels), levels(channels);
    const double pixels = static_cast<double>(images * height * width);
#pragma omp simd
    for (std::ptrdiff_t c = 0; c < channels; ++c) {
        const double scale = (gamma ? gamma[c] : 1.0) * rstd[c];
        const double tilt = -scale * rstd[c] * rstd[c] * sums.total_second[c] / pixels;
        slopes[c] = static_cast<T>(scale);
        tilts[c] = static_cast<T>(tilt);
        levels[c] = static_cast<T>(-scale * sums.total_first[c] / pixels - tilt * mean[c]);
        if (by_gamma) by_gamma[c] = static_cast<T>(sums.total_second[c] * rstd[c]);
        if (by_beta) by_beta[c] = static_cast<T>(sums.total_first[c]);
    }
    const T* __restrict scale = slopes.data();
    const T* __restrict tilt = tilts.data();
    const T* __restrict level = levels.data();
    if (!pool) {
        for (std::ptrdiff_t i = 0; i < images * height * width; ++i) {
            const T* __restrict g = slope + i * channels;
            const T* __restrict out = y + i * channels;
            const T* in = x + i * channels;
            T* to = by_x + i * channels;
#pragma omp simd
            for (std::ptrdiff_t c = 0; c < channels; ++c)
                to[c] = scale[c] * (out[c] <= 0 ? T(0) : g[c]) + (tilt[c] * in[c] + level[c]);
        }
        return;
    }
    for (std::ptrdiff_t n = 0; n < images; ++n)
        for (std::ptrdiff_t i = 0; i < height; ++i) {
            const std::ptrdiff_t at = (n * height + i) * width * channels;
            if (i >= 2 * rows) {  // a last row that no window covers
                for (std::ptrdiff_t j = 0; j < width; ++j)
#pragma omp simd
                    for (std::ptrdiff_t c = 0; c < channels; ++c) {
                        const std::ptrdiff_t k = at + j * channels + c;
                        by_x[k] = tilt[c] * x[k] + level[c];
                    }
                continue;
            }
            if (width > 2 * columns)  // a last column that no window covers
#pragma omp simd
                for (std::ptrdiff_t c = 0; c < channels; ++c) {
                    const std::ptrdiff_t k = at + (width - 1) * channels + c;
                    by_x[k] = tilt[c] * x[k] + level[c];
                }
            if (i % 2) continue;
            for (std::ptrdiff_t j = 0; j < columns; ++j) {
                const std::ptrdiff_t corner = at + 2 * j * channels, below = corner + width * channels;
                const T* a = x + corner;
                const T* b = a + channels;
                const T* d = x + below;
                const T* e = d + channels;
                T* to_a = by_x + corner;
                T* to_b = to_a + channels;
                T* to_d = by_x + below;
                T* to_e = to_d + channels;
                const std::ptrdiff_t window = ((n * rows + i / 2) * columns + j) * channels;
                const T* __restrict g = slope + window;
                const T* __restrict out = y + window;
                const T* __restrict won = peak + window;
#pragma omp simd
                for (std::ptrdiff_t c = 0; c < channels; ++c) {
                    // the first of the window that equals the winner gets what passes
                    const T p = won[c], in_a = a[c], in_b = b[c], in_d = d[c], in_e = e[c];
                    T left = out[c] <= 0 ? T(0) : scale[c] * g[c];
                    to_a[c] = (in_a == p ? left : T(0)) + (tilt[c] * in_a + level[c]);
                    left = in_a == p ? T(0) : left;
                    to_b[c] = (in_b == p ? left : T(0)) + (tilt[c] * in_b + level[c]);
                    left = in_b == p ? T(0) : left;
                    to_d[c] = (in_d == p ? left : T(0)) + (tilt[c] * in_d + level[c]);
                    left = in_d == p ? T(0) : left;
                    to_e[c] = left + (tilt[c] * in_e + level[c]);
                }
            }
        }
}

}  // namespace

// sizes: tasks, images of a task, height, width, channels, from one task's gamma to the next, the same for beta, pool
#define ENTRY(NAME, T)                                                                                              \
    extern "C" void forward_##NAME(const T* x, const T* gamma, const T* beta, T* y, T* peak, T* mean, T* rstd,      \
                                   const long long* sizes, double eps) {                                           \
        const long long images = sizes[1], height = sizes[2], width = sizes[3], channels = sizes[4];               \
        const long long in = images * height * width * channels;                                                  \
        const long long out = sizes[7] ? images * (height / 2) * (width / 2) * channels : in;                      \
        crew::share(sizes[0], [&](std::ptrdiff_t t) {                                                              \
            forward<T>(x + t * in, gamma ? gamma + t * sizes[5] : nullptr, beta ? beta + t * sizes[6] : nullptr,     \
                       y + t * out, peak + t * out, mean + t * channels, rstd + t * channels, images, height, width, \
                       channels, eps, sizes[7]);                                                                   \
        });                                                                                                        \
    }                                                                                                              \
    extern "C" void backward_##NAME(const T* slope, const T* x, const T* y, const T* peak, const T* gamma,          \
                                    const T* mean, const T* rstd, T* by_x, T* by_gamma, T* by_beta,                \
                                    const long long* sizes) {                                                      \
        const long long images = sizes[1], height = sizes[2], width = sizes[3], channels = sizes[4];               \
        const long long in = images * height * width * channels;                                                  \
        const long long out = sizes[7] ? images * (height / 2) * (width / 2) * channels : in;                      \
        crew::share(sizes[0], [&](std::ptrdiff_t t) {                                                              \
            backward<T>(slope + t * out, x + t * in, y + t * out, peak + t * out,                                    \
                        gamma ? gamma + t * sizes[5] : nullptr, mean + t * channels, rstd + t * channels,            \
                        by_x + t * in, by_gamma + t * channels, by_beta + t * channels, images, height, width,       \
                        channels, sizes[7]);                                                                       \
        });                                                                                                        \
    }

ENTRIES
