// Products of matrices on one thread, for processors on which those of torch do not use the widest registers.
//
// c = beta d + alpha a b. So many rows of b at a time that they stay in the second cache, packed where they are not vectors
// already; then each tile of c is summed in registers. Every number is the same sum, whatever else is computed.
#include <algorithm>
#include <cstring>
#include <vector>

#include "entries.h"
#include "tiles.h"

namespace {

// from one matrix of a stack to the next, from one row to the next, from one column to the next
struct Strides {
    Size stack, down, across;
};

constexpr Size CACHED = 400 * 1024, ROOM = 256;  // bytes of b at a time, and rows of it, about

template <typename T>
constexpr Size panel = WIDTH * Lanes<T>::L;  // columns of a tile

// to[panel][k][column in the panel] = scale b[k][column], columns that are missing 0
template <typename T>
void pack(const T* b, const Strides& s, Size rows, Size columns, T scale, T* to) {
    using V = typename Lanes<T>::V;
    constexpr int L = Lanes<T>::L;
    for (Size c = 0; c < columns; c += panel<T>, to += rows * panel<T>) {
        const Size width = std::min(panel<T>, columns - c);
        const Size whole = s.down == 1 ? rows / L * L : 0;
        for (Size v = 0; v < width; v += L) {
            const Size lanes = std::min<Size>(L, width - v);
            for (Size k = 0; k < whole; k += L) {
                V block[L];
                for (int i = 0; i < L; ++i)
                    block[i] = i < lanes ? *reinterpret_cast<const V*>(b + (c + v + i) * s.across + k) * scale : V{};
                transpose<T>(block);
                for (int i = 0; i < L; ++i) *reinterpret_cast<V*>(to + (k + i) * panel<T> + v) = block[i];
            }
            for (Size k = whole; k < rows; ++k) {
                const T* from = b + k * s.down + (c + v) * s.across;
                T* row = to + k * panel<T> + v;
                if (lanes == L && s.across == 1)
                    *reinterpret_cast<V*>(row) = *reinterpret_cast<const V*>(from) * scale;
                else
                    for (int i = 0; i < L; ++i) row[i] = i < lanes ? from[i * s.across] * scale : T(0);
            }
        }
    }
}

// a tile of c, of some rows and VECTORS vectors of which so many columns are wanted
template <typename T, int VECTORS>
inline void tile(const T* const* a, Size step, Size depth, const T* b, Size b_down, const T* d, const Strides& ds, T beta, T* c,
                 const Strides& cs, Size rows, Size width) {
    using V = typename Lanes<T>::V;
    constexpr int L = Lanes<T>::L;
    V acc[ROWS][VECTORS] = {};
    if (d && ds.across == 1 && width >= VECTORS * L) {
        load<T, VECTORS>([=](Size r) { return d + r * ds.down; }, rows, acc);
        for (auto& row : acc)
            for (V& v : row) v *= beta;
    } else if (d) {
        for (Size r = 0; r < rows; ++r)
            for (Size l = 0; l < std::min<Size>(width, VECTORS * L); ++l)
                acc[r][l / L][l % L] = beta * d[r * ds.down + l * ds.across];
    }
    outer<T, VECTORS>(a, step, depth, [=](Size k) { return b + k * b_down; }, acc);
    if (width >= VECTORS * L)
        store<T, VECTORS>([=](Size r) { return c + r * cs.down; }, rows, acc);
    else
        for (Size r = 0; r < rows; ++r) std::memcpy(c + r * cs.down, acc[r], width * sizeof(T));
}

template <typename T>
void product(T* c, const T* a, const T* b, const T* d, Size m, Size k, Size n, const Strides& cs, const Strides& as,
             const Strides& bs, const Strides& ds, T beta, T alpha) {
    constexpr Size L = Lanes<T>::L;
    static thread_local std::vector<T> packed;
    // as many columns at a time as leave room for enough rows of b
    const Size all = (n + panel<T> - 1) / panel<T>, fit = std::max<Size>(1, CACHED / (ROOM * panel<T> * sizeof(T)));
    const Size parts = (all + fit - 1) / fit, panels = (all + parts - 1) / parts;
    const Size depth = std::min<Size>(CACHED / (panels * panel<T> * sizeof(T)), k);
    const bool packs = bs.across != 1 || n % L || alpha != T(1);
    // never smaller: what a vector grows by is filled with zeros
    if (packs && Size(packed.size()) < panels * panel<T> * depth) packed.resize(panels * panel<T> * depth);
    for (Size left = 0; left < n; left += panels * panel<T>)
        for (Size begin = 0; begin < k; begin += depth) {
            const Size count = std::min(depth, k - begin), columns = std::min(panels * panel<T>, n - left);
            const T* rows_of_b = b + begin * bs.down + left * bs.across;
            if (packs) pack(rows_of_b, bs, count, columns, alpha, packed.data());
            for (Size row = 0; row < m; row += ROWS) {
                const Size rows = std::min<Size>(ROWS, m - row);
                const T* from[ROWS];
                for (int r = 0; r < ROWS; ++r) from[r] = a + std::min(row + r, m - 1) * as.down + begin * as.across;
                for (Size p = 0; p < columns; p += panel<T>) {
                    const Size width = std::min(panel<T>, columns - p);
                    over_columns<T>((width + L - 1) / L * L, [&](Size v, auto vectors) {
                        const Size column = left + p + v;
                        T* to = c + row * cs.down + column;
                        const T* added = begin ? to : d ? d + row * ds.down + column * ds.across : nullptr;
                        const T* right = packs ? packed.data() + p * count + v : rows_of_b + p + v;
                        tile<T, decltype(vectors)::value>(from, as.across, count, right, packs ? panel<T> : bs.down, added,
                                                          begin ? cs : ds, begin ? T(1) : beta, to, cs, rows, width - v);
                    });
                }
            }
        }
}

}  // namespace

// sizes: of the stack, rows of a, its columns, columns of b; then the strides of c, whose columns lie close, a, b and d
#define ENTRY(NAME, T)                                                                                           \
    extern "C" void product_##NAME(T* c, const T* a, const T* b, const T* d, const long long* s, double beta,    \
                                   double alpha) {                                                               \
        const Strides* by = reinterpret_cast<const Strides*>(s + 4);                                             \
        for (Size i = 0; i < s[0]; ++i)                                                                          \
            product<T>(c + i * by[0].stack, a + i * by[1].stack, b + i * by[2].stack,                            \
                       d && beta != 0 ? d + i * by[3].stack : nullptr, s[1], s[2], s[3], by[0], by[1], by[2], by[3], T(beta), \
                       T(alpha));                                                                                \
    }

ENTRIES
