// Vector registers of the processor that this is built for. No header of the standard library, as they take long to read.
namespace {

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

}  // namespace
