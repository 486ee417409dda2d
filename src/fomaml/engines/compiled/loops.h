// What the loops of compiled/loops.py call. No header of torch or of the standard library: they take seconds to read.

typedef long long number;

static thread_local int wrong;  // an index beyond its axis

static inline number within(number index, number size) {
    if ((unsigned long long)index < (unsigned long long)size) return index;
    wrong = 1;
    return 0;
}

template <class T> static inline T relu(T x) { return x < 0 ? (T)0 : x; }  // NaN stays NaN
template <class T> static inline T passed(T slope, T x, T least) { return x <= least ? (T)0 : slope; }
template <class T> static inline T square(T x) { return x * x; }
static inline float root(float x) { return __builtin_sqrtf(x); }
static inline double root(double x) { return __builtin_sqrt(x); }
static inline float logarithm(float x) { return __builtin_logf(x); }
static inline double logarithm(double x) { return __builtin_log(x); }
static inline double exponential(double x) { return __builtin_exp(x); }

// exp(x) = 2^n exp(r), |r| <= ln 2 / 2, by the polynomial of Cephes: within 2 units in the last place, in vectors.
static inline float exponential(float x) {
    const float most = 88.72283f, least = -87.33654f;
    float inside = x > most ? most : x;
    inside = inside < least ? least : inside;
    const float n = __builtin_floorf(inside * 1.44269504088896341f + 0.5f);
    float r = inside - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const int half = (int)n / 2, rest = (int)n - half;  // 2^n in two factors: 2^128 is no float
    const int one = (half + 127) << 23, two = (rest + 127) << 23;
    float low, high;
    __builtin_memcpy(&low, &one, 4);
    __builtin_memcpy(&high, &two, 4);
    float found = p * low * high;
    found = x > most ? __builtin_inff() : found;
    found = x < least ? 0.0f : found;
    return x != x ? x : found;
}

// log x of 1 and more, by the polynomial of Cephes: within 1 unit in the last place, in vectors. NaN stays NaN.
static inline double logarithm_from_one(double x) { return __builtin_log(x); }
static inline float logarithm_from_one(float x) {
    int bits;
    __builtin_memcpy(&bits, &x, 4);
    int power = (bits >> 23) - 126;
    bits = (bits & 0x7fffff) | 0x3f000000;  // x / 2^power, from a half to 1
    float m;
    __builtin_memcpy(&m, &bits, 4);
    const int low = m < 0.70710678f;
    const float n = power - low;
    m = m - 1.0f + (low ? m : 0.0f);
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const float square = m * m, tail = p * m * square - n * 2.12194440e-4f - 0.5f * square;
    return x != x ? x : m + tail + n * 0.693359375f;
}

constexpr number BLOCK = 16;  // rows at a time

// The logarithm of the softmax of a block of short rows, in place: all of them side by side in vectors.
template <class T, number SIZE> static inline void log_softmax(T* rows, number count) {
    T x[SIZE][BLOCK] = {}, most[BLOCK], total[BLOCK] = {};
    const auto move = [&](number count, auto to) {
        for (number r = 0; r < count; r++)
            for (number i = 0; i < SIZE; i++) to(rows[r * SIZE + i], r, i);
    };
    const auto in = [&](T& one, number r, number i) { x[i][r] = one; };
    const auto out = [&](T& one, number r, number i) { one = x[i][r] - total[r]; };
    count == BLOCK ? move(BLOCK, in) : move(count, in);
    for (number r = 0; r < BLOCK; r++) most[r] = x[0][r];
    for (number i = 1; i < SIZE; i++)
        for (number r = 0; r < BLOCK; r++) most[r] = x[i][r] > most[r] ? x[i][r] : most[r];
    for (number i = 0; i < SIZE; i++)
        for (number r = 0; r < BLOCK; r++) {
            x[i][r] -= most[r];  // first: most and the logarithm in one number would lose its digits
            total[r] += exponential(x[i][r]);
        }
    for (number r = 0; r < BLOCK; r++) total[r] = logarithm_from_one(total[r]);
    count == BLOCK ? move(BLOCK, out) : move(count, out);
}
template <class T> static inline T sigmoid(T x) { return (T)1 / ((T)1 + exponential(-x)); }

// Products are torch's own, through its C interface, or those of products.cpp: what they are called by is given once.
typedef int (*Made)(void*, number, const number*, const number*, number, int, int, int, void**);
typedef int (*Gone)(void*);
typedef int (*Product)(void*, void*, void*);
typedef int (*Added)(void*, void*, void*, void*, double, double);
static Made make;
static Gone drop;
static Product mm, bmm;
static Added addmm, baddbmm;
typedef void (*Own)(void*, const void*, const void*, const void*, const number*, double, double);
static Own product_float, product_double;
extern "C" void use(void** functions) {
    make = (Made)functions[0];
    drop = (Gone)functions[1];
    mm = (Product)functions[2];
    bmm = (Product)functions[3];
    addmm = (Added)functions[4];
    baddbmm = (Added)functions[5];
    product_float = (Own)functions[6];
    product_double = (Own)functions[7];
}

// Rows of one product, or products of a stack, on so many threads. s: see products.cpp.
template <class T>
static inline void product(int threads, T* c, const T* a, const T* b, const T* d, const number* s, double beta, double alpha) {
    const bool stack = s[0] > 1;
    const int by = stack ? 0 : 1;
    const Own on_one = sizeof(T) == 4 ? product_float : product_double;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        const number begin = s[by] * part / threads, end = s[by] * (part + 1) / threads;
        number own[16];
        for (int i = 0; i < 16; i++) own[i] = s[i];
        own[by] = end - begin;
        on_one(c + begin * s[4 + by], a + begin * s[7 + by], stack ? b + begin * s[10] : b,
               d ? d + begin * s[13 + by] : nullptr, own, beta, alpha);
    }
}

// A tensor that products read or write. place: of inner memory -1, else the number of an argument or result.
struct Operand {
    int place, dtype, axes;
    number offset, sizes[3], strides[3];
};

static int tensors(const Operand* operands, int count, bool inner, char* memory, void** given, void** handles) {
    int failed = 0;
    for (int i = 0; i < count; i++) {
        const Operand& one = operands[i];
        if ((one.place < 0) != inner) continue;
        char* start = inner ? memory : (char*)given[one.place];
        failed |= make(start + one.offset, one.axes, one.sizes, one.strides, 0, one.dtype, 0, -1, handles + i);
    }
    return failed;
}
