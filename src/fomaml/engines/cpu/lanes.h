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

template <int... I>
struct Places {};
template <int N, int... I>
struct Upto : Upto<N - 1, N - 1, I...> {};
template <int... I>
struct Upto<0, I...> {
    using All = Places<I...>;  // 0, 1, …
};

// lanes of two vectors: lane i is number FROM::of(i) of both, one after the other
template <typename T, typename FROM, int... I>
inline typename Lanes<T>::V picked(typename Lanes<T>::V a, typename Lanes<T>::V b, Places<I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, FROM::of(I)...);
#else
    const typename Lanes<T>::I from = {FROM::of(I)...};
    return __builtin_shuffle(a, b, from);
#endif
}

// in blocks of two halves: of the one half, and after it that of the other vector
template <int L, int HALF, bool SECOND>
struct Half {
    static constexpr int of(int i) {
        const int block = i / (2 * HALF) * (2 * HALF), within = i % (2 * HALF), second = SECOND ? HALF : 0;
        return within < HALF ? block + within + second : L + block + within - HALF + second;
    }
};

// one vector of the sums of L vectors: halves are folded together until each lane holds a sum, the lanes in order
template <typename T, int HALF = Lanes<T>::L / 2>
inline typename Lanes<T>::V sums(typename Lanes<T>::V* v) {
    constexpr int L = Lanes<T>::L;
    using All = typename Upto<L>::All;
#pragma GCC unroll 8
    for (int i = 0; i < HALF; ++i)
        v[i] = picked<T, Half<L, HALF, false>>(v[i], v[i + HALF], All()) +
               picked<T, Half<L, HALF, true>>(v[i], v[i + HALF], All());
    if constexpr (HALF > 1)
        return sums<T, HALF / 2>(v);
    else
        return v[0];
}

// of two vectors in turns, from lane START on
template <int L, int START>
struct Zipped {
    static constexpr int of(int i) { return START + i / 2 + i % 2 * L; }
};

// L vectors of L numbers become those of the columns: rows are zipped with those half of them further, log2(L) times
template <typename T>
inline void transpose(typename Lanes<T>::V* v) {
    using V = typename Lanes<T>::V;
    constexpr int L = Lanes<T>::L;
    using All = typename Upto<L>::All;
    for (int round = 1; round < L; round *= 2) {
        V zipped[L];
#pragma GCC unroll 8
        for (int i = 0; i < L / 2; ++i) {
            zipped[2 * i] = picked<T, Zipped<L, 0>>(v[i], v[i + L / 2], All());
            zipped[2 * i + 1] = picked<T, Zipped<L, L / 2>>(v[i], v[i + L / 2], All());
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) v[i] = zipped[i];
    }
}

}  // namespace
