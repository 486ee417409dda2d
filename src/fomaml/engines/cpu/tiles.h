// Tiles of sums of products that stay in the processor's vector registers.
#pragma once

#include <cstddef>
#include <type_traits>

namespace {

using Size = std::ptrdiff_t;

// A vector register of the processor that this is built for. Wider ones would live in memory, several times slower.
#if defined(__AVX512F__)
constexpr int BYTES = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int BYTES = 16, REGISTERS = 32;
#else
constexpr int BYTES = 16, REGISTERS = 16;
#endif

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
    typedef float V __attribute__((vector_size(BYTES), aligned(4), may_alias));
    typedef int I __attribute__((vector_size(BYTES)));
    static constexpr int L = BYTES / sizeof(float);
};
template <>
struct Lanes<double> {
    typedef double V __attribute__((vector_size(BYTES), aligned(8), may_alias));
    typedef long long I __attribute__((vector_size(BYTES)));
    static constexpr int L = BYTES / sizeof(double);
};

// one vector of the sums of L vectors: halves are folded together until each lane holds a sum
template <typename T>
inline typename Lanes<T>::V sums(typename Lanes<T>::V* v) {
    using V = typename Lanes<T>::V;
    constexpr int L = Lanes<T>::L;
    int left = L;
#pragma GCC unroll 4
    for (int half = L / 2; half >= 1; half /= 2) {
        typename Lanes<T>::I low, high;
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
            const int block = i / (2 * half) * (2 * half), within = i % (2 * half);
            low[i] = within < half ? block + within : L + block + within - half;
            high[i] = within < half ? block + within + half : L + block + within;
        }
        left /= 2;
        // folding v[i] with v[i + left] leaves the lanes in order
#pragma GCC unroll 8
        for (int i = 0; i < left; ++i) {
            const V a = v[i], b = v[i + left];
#if defined(__clang__)
            V x, y;
            for (int l = 0; l < L; ++l) {
                x[l] = low[l] < L ? a[low[l]] : b[low[l] - L];
                y[l] = high[l] < L ? a[high[l]] : b[high[l] - L];
            }
            v[i] = x + y;
#else
            v[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
        }
    }
    return v[0];
}

// L vectors of L numbers become those of the columns: rows are zipped with those half of them further, log2(L) times
template <typename T>
inline void transpose(typename Lanes<T>::V* v) {
    using V = typename Lanes<T>::V;
    constexpr int L = Lanes<T>::L;
    typename Lanes<T>::I low, high;
    for (int i = 0; i < L; ++i) {
        low[i] = i / 2 + i % 2 * L;
        high[i] = low[i] + L / 2;
    }
    for (int round = 1; round < L; round *= 2) {
        V zipped[L];
#pragma GCC unroll 8
        for (int i = 0; i < L / 2; ++i) {
            const V a = v[i], b = v[i + L / 2];
#if defined(__clang__)
            for (int l = 0; l < L; ++l) {
                zipped[2 * i][l] = low[l] < L ? a[low[l]] : b[low[l] - L];
                zipped[2 * i + 1][l] = high[l] < L ? a[high[l]] : b[high[l] - L];
            }
#else
            zipped[2 * i] = __builtin_shuffle(a, b, low);
            zipped[2 * i + 1] = __builtin_shuffle(a, b, high);
#endif
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) v[i] = zipped[i];
    }
}

constexpr int ROWS = 6, WIDTH = REGISTERS / 8;  // of a tile of vectors; it fills three quarters of the registers

// acc[r] += sum over k of a[r][k * step] · b(k), b(k) a row of VECTORS vectors
template <typename T, int VECTORS, typename B>
inline void outer(const T* const* a, Size step, Size count, B b, typename Lanes<T>::V (*acc)[VECTORS]) {
    using V = typename Lanes<T>::V;
    constexpr int L = Lanes<T>::L;
    V sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = acc[r][v];
    for (Size k = 0; k < count; ++k) {
        const T* row = b(k);
        V right[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) right[v] = *reinterpret_cast<const V*>(row + v * L);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            const T x = a[r][k * step];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sum[r][v] += x * right[v];
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) acc[r][v] = sum[r][v];
}

// the first rows of acc from where to(r) points
template <typename T, int VECTORS, typename To>
inline void load(To to, Size rows, typename Lanes<T>::V (*acc)[VECTORS]) {
    using V = typename Lanes<T>::V;
    for (Size r = 0; r < rows; ++r)
        for (int v = 0; v < VECTORS; ++v) acc[r][v] = *reinterpret_cast<const V*>(to(r) + v * Lanes<T>::L);
}

// and back
template <typename T, int VECTORS, typename To>
inline void store(To to, Size rows, const typename Lanes<T>::V (*acc)[VECTORS]) {
    using V = typename Lanes<T>::V;
    for (Size r = 0; r < rows; ++r)
        for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<V*>(to(r) + v * Lanes<T>::L) = acc[r][v];
}

// calls body<vectors>(first column) over columns, WIDTH vectors at a time and then what is left
template <typename T, int VECTORS = WIDTH, typename Body>
inline void over_columns(Size columns, Body body, Size c = 0) {
    constexpr int STEP = VECTORS * Lanes<T>::L;
    for (; c + STEP <= columns; c += STEP) body(c, std::integral_constant<int, VECTORS>());
    if constexpr (VECTORS > 1) over_columns<T, VECTORS / 2>(columns, body, c);
}

}  // namespace
