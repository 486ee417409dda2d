// Products of small matrices whose sizes are known here: what a library of products does around one takes longer than it.
//
// c = beta d + alpha a b, of M rows, N columns and a sum of K. _DOWN: from one row to the next; _ACROSS: from one column
// to the next, of c 1. Every number is the same sum, however many rows there are.

template <class T, number M, number K, number N, number C_DOWN, number A_DOWN, number A_ACROSS, number B_DOWN,
          number B_ACROSS, number D_DOWN, number D_ACROSS>
struct Small {
    using V = typename Lanes<T>::V;
    static constexpr number L = Lanes<T>::L, VECTORS = (N + L - 1) / L, LAST = N - (VECTORS - 1) * L;
    typedef T Packed[VECTORS * L];  // a row of b, columns that are missing 0

    // some rows of c, and so many of its columns, in registers; those of the last vector are LANES
    template <number ROWS, number WIDE, number LANES>
    static inline void tile(T* c, const T* a, const T* b, const T* d, T beta) {
        V sum[ROWS][WIDE] = {};
        const auto wanted = [](number v) { return v + 1 < WIDE ? L : LANES; };
        if (d)
            for (number r = 0; r < ROWS; r++)
                for (number v = 0; v < WIDE; v++)
                    for (number l = 0; l < wanted(v); l++) sum[r][v][l] = beta * d[r * D_DOWN + (v * L + l) * D_ACROSS];
        for (number k = 0; k < K; k++) {
            V right[WIDE];
#pragma GCC unroll 4
            for (number v = 0; v < WIDE; v++) right[v] = *(const V*)(b + k * VECTORS * L + v * L);
#pragma GCC unroll 24
            for (number r = 0; r < ROWS; r++) {
                const T left = a[r * A_DOWN + k * A_ACROSS];
#pragma GCC unroll 4
                for (number v = 0; v < WIDE; v++) sum[r][v] += left * right[v];
            }
        }
        for (number r = 0; r < ROWS; r++)
            for (number v = 0; v < WIDE; v++)
                __builtin_memcpy(c + r * C_DOWN + v * L, &sum[r][v], wanted(v) * sizeof(T));
    }

    // these columns of all rows
    template <number WIDE, number LANES>
    static inline void panel(T* c, const T* a, const T* b, const T* d, T beta) {
        constexpr number MOST = REGISTERS * 3 / 4 / WIDE, BLOCKS = (M + MOST - 1) / MOST;
        constexpr number ROWS = (M + BLOCKS - 1) / BLOCKS, LEFT = M % ROWS, END = M - LEFT;
        for (number r = 0; r < END; r += ROWS)
            tile<ROWS, WIDE, LANES>(c + r * C_DOWN, a + r * A_DOWN, b, d ? d + r * D_DOWN : d, beta);
        if constexpr (LEFT > 0)
            tile<LEFT, WIDE, LANES>(c + END * C_DOWN, a + END * A_DOWN, b, d ? d + END * D_DOWN : d, beta);
    }

    static inline void columns(T* c, const T* a, const T* b, const T* d, T beta) {
        constexpr number END = N / (4 * L) * 4 * L, LEFT = N - END;
        for (number n = 0; n < END; n += 4 * L) panel<4, L>(c + n, a, b + n, d ? d + n * D_ACROSS : d, beta);
        if constexpr (LEFT > 0)
            panel<(LEFT + L - 1) / L, LAST>(c + END, a, b + END, d ? d + END * D_ACROSS : d, beta);
    }

    static inline void pack(const T* b, T alpha, Packed* to) {
        constexpr number TURNED = B_DOWN == 1 && B_ACROSS != 1 ? K / L * L : 0;  // rows that are turned in registers
        for (number v = 0; v < VECTORS * L && TURNED; v += L)
            for (number k = 0; k < TURNED; k += L) {
                V block[L];
                for (number i = 0; i < L; i++)
                    block[i] = v + i < N ? *(const V*)(b + (v + i) * B_ACROSS + k) * alpha : V{};
                transpose<T>(block);
                for (number i = 0; i < L; i++) *(V*)(to[k + i] + v) = block[i];
            }
        constexpr number WHOLE = B_ACROSS == 1 ? N / L * L : 0;  // columns that are vectors already
        for (number k = TURNED; k < K; k++) {
            for (number n = 0; n < WHOLE; n += L) *(V*)(to[k] + n) = *(const V*)(b + k * B_DOWN + n) * alpha;
            for (number n = WHOLE; n < N; n++) to[k][n] = alpha * b[k * B_DOWN + n * B_ACROSS];
            for (number n = N; n < VECTORS * L; n++) to[k][n] = 0;
        }
    }

    // Whether sums go along vectors instead of a vector of columns, most of which would be empty. A vector takes about ten
    // half additions to become a sum.
    static constexpr bool ALONG =
        A_ACROSS == 1 && B_DOWN == 1 && N <= L && (N == 1 || N * (K / L + 10) < VECTORS * K * 6 / 5);

    // the first of a vector, the others 0
    static inline V part(const T* from, number count) {
        V found = {};
        __builtin_memcpy(&found, from, count * sizeof(T));
        return found;
    }

    // of so many rows of a with each column of b
    template <number ROWS>
    static inline void dots(T* c, const T* a, const T* b, const T* d, T beta, T alpha) {
        V sum[L] = {};
        const auto add = [&](number k, auto at) {
            V right[N];
#pragma GCC unroll 16
            for (number n = 0; n < N; n++) right[n] = at(b + n * B_ACROSS + k);
#pragma GCC unroll 16
            for (number r = 0; r < ROWS; r++) {
                const V left = at(a + r * A_DOWN + k);
#pragma GCC unroll 16
                for (number n = 0; n < N; n++) sum[r * N + n] += left * right[n];
            }
        };
        for (number k = 0; k + L <= K; k += L) add(k, [](const T* from) { return *(const V*)from; });
        if constexpr (K % L > 0) add(K / L * L, [](const T* from) { return part(from, K % L); });
        const V found = sums<T>(sum);
        for (number r = 0; r < ROWS; r++)
            for (number n = 0; n < N; n++)
                c[r * C_DOWN + n] = alpha * found[r * N + n] + (d ? beta * d[r * D_DOWN + n * D_ACROSS] : 0);
    }

    static inline void product(T* c, const T* a, const T* b, const T* d, T beta, T alpha) {
        if constexpr (ALONG) {
            constexpr number ROWS = L / N < M ? L / N : M, LEFT = M % ROWS;
            for (number r = 0; r + ROWS <= M; r += ROWS)
                dots<ROWS>(c + r * C_DOWN, a + r * A_DOWN, b, d ? d + r * D_DOWN : d, beta, alpha);
            if constexpr (LEFT > 0)
                dots<LEFT>(c + (M - LEFT) * C_DOWN, a + (M - LEFT) * A_DOWN, b, d ? d + (M - LEFT) * D_DOWN : d, beta, alpha);
        } else {
            alignas(BYTES) Packed packed[K];
            pack(b, alpha, packed);
            columns(c, a, packed[0], d, beta);
        }
    }
};
