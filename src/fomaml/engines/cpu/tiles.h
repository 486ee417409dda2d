// Tiles of sums of products that stay in the processor's vector registers.
#pragma once

#include <cstddef>
#include <type_traits>

#include "lanes.h"

namespace {

using Size = std::ptrdiff_t;

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
