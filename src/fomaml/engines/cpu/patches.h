// The patches of padded images, channels-last: where they lie, and which of them a pixel is in.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "tiles.h"

namespace {

struct Shape {
    Size images, height, width, channels, outputs, rows, columns, stride_y, stride_x, pad_y, pad_x;

    Size out_height() const { return (height + 2 * pad_y - rows) / stride_y + 1; }
    Size out_width() const { return (width + 2 * pad_x - columns) / stride_x + 1; }
    Size pixels() const { return images * out_height() * out_width(); }
    Size line() const { return (width + 2 * pad_x) * channels; }           // of a padded image
    Size padded() const { return (height + 2 * pad_y) * line(); }          // a padded image
    Size run() const { return columns * channels; }                        // one row of a patch
    Size patch() const { return rows * run(); }
};

template <typename T>
void pad(const T* x, const Shape& s, std::vector<T>& to) {
    to.assign(s.images * s.padded(), T(0));
    for (Size n = 0; n < s.images; ++n)
        for (Size i = 0; i < s.height; ++i)
            std::memcpy(to.data() + n * s.padded() + (i + s.pad_y) * s.line() + s.pad_x * s.channels,
                        x + (n * s.height + i) * s.width * s.channels, s.width * s.channels * sizeof(T));
}

// where in the padded images each output pixel's patch begins
void places(const Shape& s, std::vector<Size>& at) {
    at.resize(s.pixels());
    Size* to = at.data();
    for (Size n = 0; n < s.images; ++n)
        for (Size i = 0; i < s.out_height(); ++i)
            for (Size j = 0; j < s.out_width(); ++j)
                *to++ = n * s.padded() + i * s.stride_y * s.line() + j * s.stride_x * s.channels;
}

// Pixels of the images whose row and column leave the same remainders by the strides: the same weights reach them.
struct Reached {
    std::vector<Size> pixels;
    std::vector<Size> weights;  // where in a patch
    std::vector<Size> sources;  // for each weight, which output it reaches each pixel from; -1 for none
};

void reached(const Shape& s, std::vector<Reached>& found) {
    for (Size y = 0; y < std::min(s.stride_y, s.height); ++y)
        for (Size x = 0; x < std::min(s.stride_x, s.width); ++x) {
            found.emplace_back();
            Reached& own = found.back();
            for (Size n = 0; n < s.images; ++n)
                for (Size i = y; i < s.height; i += s.stride_y)
                    for (Size j = x; j < s.width; j += s.stride_x) own.pixels.push_back((n * s.height + i) * s.width + j);
            for (Size u = (y + s.pad_y) % s.stride_y; u < s.rows; u += s.stride_y)
                for (Size v = (x + s.pad_x) % s.stride_x; v < s.columns; v += s.stride_x) {
                    own.weights.push_back((u * s.columns + v) * s.channels);
                    for (Size n = 0; n < s.images; ++n)
                        for (Size i = y + s.pad_y - u; i < s.height + s.pad_y - u; i += s.stride_y)
                            for (Size j = x + s.pad_x - v; j < s.width + s.pad_x - v; j += s.stride_x) {
                                const Size down = i / s.stride_y, across = j / s.stride_x;
                                const bool inside = i >= 0 && j >= 0 && down < s.out_height() && across < s.out_width();
                                own.sources.push_back(inside ? (n * s.out_height() + down) * s.out_width() + across : -1);
                            }
                }
        }
}

// the patches as rows one below the other: for few channels, where vectors run over the outputs
template <typename T>
void patches(const T* padded, const std::vector<Size>& at, std::vector<T>& to, const Shape& s) {
    to.resize(s.pixels() * s.patch());
    T* row = to.data();
    for (Size place : at)
        for (Size i = 0; i < s.rows; ++i)
            for (Size k = 0; k < s.run(); ++k) *row++ = padded[place + i * s.line() + k];
}

// turned[k][out] = w[out][k], for some outputs
template <typename T>
void turn(const T* w, std::vector<T>& turned, const Shape& s, Size begin, Size end) {
    using V = typename Lanes<T>::V;
    constexpr Size L = Lanes<T>::L;
    const Size length = s.patch();
    turned.resize(length * s.outputs);
    for (Size o = begin; o < end; o += L) {
        const Size lanes = std::min(L, end - o), whole = lanes == L ? length / L * L : 0;
        for (Size k = 0; k < whole; k += L) {
            V block[L];
            for (int i = 0; i < L; ++i) block[i] = *reinterpret_cast<const V*>(w + (o + i) * length + k);
            transpose<T>(block);
            for (int i = 0; i < L; ++i) *reinterpret_cast<V*>(turned.data() + (k + i) * s.outputs + o) = block[i];
        }
        for (Size k = whole; k < length; ++k)
            for (Size i = 0; i < lanes; ++i) turned[k * s.outputs + o + i] = w[(o + i) * length + k];
    }
}

}  // namespace
