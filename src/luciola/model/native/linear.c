/* y = W f(x): a few rows against a matrix, f the identity, RMSNorm, or SwiGLU's product of two halves.

One row costs what reading W costs; sixteen rows share what is read. Sums are kept for a tile of ROWS x OUTPUTS, enough
of them at once to keep the multipliers busy. However many rows there are, and whatever the tile, one output of one row
is always computed alike: sixteen lanes, each adding its products in ascending order, then the tree of `sums_of_8`. So a
row's result does not depend on its neighbours, nor on the number of threads.

W is float32, bfloat16, or quantised in groups along its rows: int8 with a scale, or int4 with a scale and a minimum.
What is multiplied is always the same float32 number, decoded on the way for few rows, and once for all where there are
more. */
#include "vector.h"

#include <stdlib.h>

enum { FLOAT32, BFLOAT16, INT8, INT4 };
enum { IDENTITY, NORM, NORM_BFLOAT16, SWIGLU };
#ifdef AVX512
enum { ROWS = 3, TOGETHER = 8 }; /* 24 sums and what they are made of, in 32 registers */
#else
enum { ROWS = 1, TOGETHER = 4 }; /* 8 sums in 16 registers, or 16 in 32 */
#endif
enum {
    OUTPUTS = 8,    /* of a tile; TOGETHER of them have their sums in registers */
    SPAN = 768,     /* of K: a decoded tile of 24 KiB stays in the first cache */
    BATCH = 32,     /* rows whose sums are kept at once */
    FEWEST = 32,    /* numbers in a group, at the least */
};

/* W and all that belongs to it; `linear.py` fills it in once, field by field in this order. */
typedef struct {
    const char *data;
    const uint16_t *scales, *minima; /* float16, (M, groups), of quantised kinds */
    const float *bias;               /* (M), or NULL */
    const void *norm;                /* the norm's weight (K) */
    ptrdiff_t M, K, stride, groups;  /* stride: bytes from row to row */
    int32_t kind, shift, f;          /* a group has 2^shift numbers, the last one of a row padded */
    float eps;
} Matrix;

typedef struct {
    const Matrix *w;
    float *y;
    const float *x, *residual;
    ptrdiff_t N, K, x_stride; /* K: with what the last group was padded with */
} Product;

/* Scales and minima of a tile's groups within a span. */
typedef struct {
    float scale[OUTPUTS][SPAN / FEWEST], minimum[OUTPUTS][SPAN / FEWEST];
} Groups;

/* Part `part` of sixteen weights from number k of a row on; of INT4 those whose nibbles are `high` or low. */
INLINE vec weights(const int kind, const char *row, ptrdiff_t k, int part, float scale, float minimum, int high)
{
    k += part * WIDTH;
    if (kind == FLOAT32)
        return load(row + 4 * k);
    if (kind == BFLOAT16)
        return load_bf16((const uint16_t *)row + k);
    if (kind == INT8)
        return load_int8((const int8_t *)row + k) * scale;
    return load_int4((const uint8_t *)row + (k - part * WIDTH) / 2 + part * WIDTH, high, scale, minimum);
}

/* sums[row][output] += x . w over n numbers, whole sixteens, for TOGETHER outputs. Fetches as much memory as it reads,
from `ahead` on, unless that is NULL. `kind` and `rows` are constants where this is inlined. */
INLINE void dot(const int kind, const int rows, float (*sums)[OUTPUTS][LANES], const float *x, ptrdiff_t x_stride,
                const char *const *w, const float (*scales)[SPAN / FEWEST], const float (*minima)[SPAN / FEWEST],
                int shift, ptrdiff_t n, const char *ahead)
{
    const int nibbles = kind == INT4 ? 2 : 1; /* of a byte; they are sixteen numbers apart */
    const int step = TOGETHER * (kind == FLOAT32 ? 64 : kind == BFLOAT16 ? 32 : 16); /* bytes */
    vec s[ROWS][TOGETHER][PARTS], v[2][ROWS][PARTS];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int o = 0; o < TOGETHER; o++)
            UNROLL
            for (int p = 0; p < PARTS; p++)
                s[r][o][p] = load(sums[r][o] + p * WIDTH);
    for (ptrdiff_t k = 0; k < n; k += nibbles * LANES) {
        if (ahead != NULL)
            for (int line = 0; line < step; line += 64, ahead += 64)
                __builtin_prefetch(ahead, 0, 2);
        UNROLL
        for (int high = 0; high < nibbles; high++)
            for (int r = 0; r < rows; r++)
                for (int p = 0; p < PARTS; p++)
                    v[high][r][p] = load(x + r * x_stride + k + high * LANES + p * WIDTH);
        UNROLL
        for (int o = 0; o < TOGETHER; o++) {
            const float scale = kind >= INT8 ? scales[o][k >> shift] : 0;
            const float minimum = kind == INT4 ? minima[o][k >> shift] : 0;
            UNROLL
            for (int high = 0; high < nibbles; high++)
                UNROLL
                for (int p = 0; p < PARTS; p++) {
                    vec weight = weights(kind, w[o], k, p, scale, minimum, high);
                    if (rows > 1)
                        keep(&weight); /* else GCC loads it anew for each row */
                    for (int r = 0; r < rows; r++)
                        s[r][o][p] += v[high][r][p] * weight;
                }
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int o = 0; o < TOGETHER; o++)
            UNROLL
            for (int p = 0; p < PARTS; p++)
                store(sums[r][o] + p * WIDTH, s[r][o][p]);
}

#define DOT(KIND, N)                                                                                                   \
    for (int o = 0; o < OUTPUTS; o += TOGETHER)                                                                        \
        dot(KIND, N, (float (*)[OUTPUTS][LANES])sums[0][o], x, x_stride, w + o, groups->scale + o,                     \
            groups->minimum + o, shift, n, ahead == NULL ? NULL : ahead + o * stride)
#define DOTS(KIND)                                                                                                     \
    static void dot_##KIND(int rows, float (*sums)[OUTPUTS][LANES], const float *x, ptrdiff_t x_stride,                \
                           const char *const *w, const Groups *groups, int shift, ptrdiff_t n, const char *ahead,      \
                           ptrdiff_t stride)                                                                           \
    {                                                                                                                  \
        for (; rows >= ROWS; rows -= ROWS, sums += ROWS, x += ROWS * x_stride)                                         \
            DOT(KIND, ROWS);                                                                                           \
        if (rows == 2)                                                                                                 \
            DOT(KIND, ROWS < 2 ? ROWS : 2);                                                                            \
        if (rows == 1)                                                                                                 \
            DOT(KIND, 1);                                                                                              \
    }
DOTS(FLOAT32)
DOTS(BFLOAT16)
DOTS(INT8)
DOTS(INT4)

/* n numbers of a row, whole sixteens, as float32. */
INLINE void decode(const int kind, float *to, const char *row, const float *scales, const float *minima, int shift,
                   ptrdiff_t n)
{
    const int nibbles = kind == INT4 ? 2 : 1;
    for (ptrdiff_t k = 0; k < n; k += nibbles * LANES)
        for (int high = 0; high < nibbles; high++)
            for (int p = 0; p < PARTS; p++)
                store(to + k + high * LANES + p * WIDTH,
                      weights(kind, row, k, p, scales[k >> shift], minima[k >> shift], high));
}

/* OUTPUTS outputs of all rows, from output m on. */
static void tile(const Product *p, ptrdiff_t m)
{
    const Matrix *w = p->w;
    const ptrdiff_t here = w->M - m < OUTPUTS ? w->M - m : OUTPUTS;
    const ptrdiff_t bytes_of_8 = w->kind == FLOAT32 ? 32 : w->kind == BFLOAT16 ? 16 : w->kind == INT8 ? 8 : 4;
    float sums[BATCH][OUTPUTS][LANES] __attribute__((aligned(64)));
    float panel[OUTPUTS][SPAN] __attribute__((aligned(64)));
    Groups groups;
    /* Rows are short, and the processor's own guesses of what comes next end with each: while a tile is read, the next
    one is fetched. */
    for (ptrdiff_t at = (m + OUTPUTS) * w->groups, end = at + OUTPUTS * w->groups; at < end; at += 32) {
        __builtin_prefetch(w->scales + at);
        if (w->minima != NULL)
            __builtin_prefetch(w->minima + at);
    }
    for (ptrdiff_t first = 0; first < p->N; first += BATCH) {
        const int rows = p->N - first < BATCH ? (int)(p->N - first) : BATCH;
        memset(sums, 0, rows * sizeof *sums);
        for (ptrdiff_t k = 0; k < p->K; k += SPAN) {
            const ptrdiff_t left = p->K - k < SPAN ? p->K - k : SPAN, n = left / LANES * LANES;
            const char *row[OUTPUTS], *end[OUTPUTS];
            for (int o = 0; o < OUTPUTS; o++) {
                const ptrdiff_t output = m + (o < here ? o : here - 1); /* what is beyond the last is not used */
                row[o] = w->data + output * w->stride + k / 8 * bytes_of_8;
                end[o] = row[o] + n / 8 * bytes_of_8;
                if (w->scales != NULL)
                    halves(groups.scale[o], w->scales + output * w->groups + (k >> w->shift), n >> w->shift);
                if (w->minima != NULL)
                    halves(groups.minimum[o], w->minima + output * w->groups + (k >> w->shift), n >> w->shift);
            }
            const char *next = w->data + (m + OUTPUTS) * w->stride + TOGETHER * (k / 8 * bytes_of_8);
            const char *ahead = rows > ROWS ? NULL : next;
            int kind = w->kind;
            if (kind != FLOAT32 && rows > ROWS) {
                for (int o = 0; o < OUTPUTS; o++) {
                    const float *scale = groups.scale[o], *minimum = groups.minimum[o];
                    if (kind == BFLOAT16)
                        decode(BFLOAT16, panel[o], row[o], scale, minimum, 62, n);
                    else if (kind == INT8)
                        decode(INT8, panel[o], row[o], scale, minimum, w->shift, n);
                    else
                        decode(INT4, panel[o], row[o], scale, minimum, w->shift, n);
                    row[o] = (const char *)panel[o];
                }
                kind = FLOAT32;
            }
            const float *x = p->x + first * p->x_stride + k;
            if (kind == FLOAT32)
                dot_FLOAT32(rows, sums, x, p->x_stride, row, &groups, 0, n, ahead, w->stride);
            else if (kind == BFLOAT16)
                dot_BFLOAT16(rows, sums, x, p->x_stride, row, &groups, 0, n, ahead, w->stride);
            else if (kind == INT8)
                dot_INT8(rows, sums, x, p->x_stride, row, &groups, w->shift, n, ahead, w->stride);
            else
                dot_INT4(rows, sums, x, p->x_stride, row, &groups, w->shift, n, ahead, w->stride);
            if (n < left) {
                for (int o = 0; o < OUTPUTS; o++) {
                    for (ptrdiff_t i = 0; i < LANES; i++)
                        panel[o][i] = i >= left - n           ? 0
                                      : w->kind == BFLOAT16 ? bf16_to_float(((const uint16_t *)end[o])[i])
                                                            : ((const float *)end[o])[i];
                    row[o] = (const char *)panel[o];
                }
                dot_FLOAT32(rows, sums, x + n, p->x_stride, row, &groups, 0, LANES, NULL, 0);
            }
        }
        for (int r = 0; r < rows; r++) {
            float y[OUTPUTS];
            sums_of_8(y, sums[r]);
            const ptrdiff_t at = (first + r) * w->M + m;
            for (ptrdiff_t o = 0; o < here; o++) {
                float value = y[o];
                if (w->bias != NULL)
                    value += w->bias[m + o];
                if (p->residual != NULL)
                    value += p->residual[at + o];
                p->y[at + o] = value;
            }
        }
    }
}

/* f(x) of one row, followed by zeros up to `padded` numbers. */
static void prepare(float *restrict to, const float *restrict x, ptrdiff_t padded, const Matrix *w)
{
    const ptrdiff_t K = w->K;
    const float *norm = w->norm;
    const uint16_t *norm_bf16 = w->norm;
    float squares[LANES] = {0}, r = 1;
    if (w->f == NORM || w->f == NORM_BFLOAT16) {
        ptrdiff_t k = 0;
        for (; k + LANES <= K; k += LANES)
            for (int l = 0; l < LANES; l++)
                squares[l] += x[k + l] * x[k + l];
        for (int l = 0; k + l < K; l++)
            squares[l] += x[k + l] * x[k + l];
        r = 1 / sqrtf(sum(squares) / (float)K + w->eps);
    }
    if (w->f == NORM)
        for (ptrdiff_t k = 0; k < K; k++)
            to[k] = x[k] * r * norm[k];
    else if (w->f == NORM_BFLOAT16)
        for (ptrdiff_t k = 0; k < K; k++)
            to[k] = x[k] * r * bf16_to_float(norm_bf16[k]);
    else if (w->f == SWIGLU)
        for (ptrdiff_t k = 0; k < K; k++)
            to[k] = silu(x[k]) * x[K + k];
    else
        memcpy(to, x, K * sizeof *to);
    memset(to + K, 0, (padded - K) * sizeof *to);
}

typedef struct { /* linear.py fills it */
    float *y;
    const float *x, *residual;
    const Matrix *w;
    ptrdiff_t N, x_stride;
} Call;

/* y (N, M) = W f(x) + bias + residual, with x (N, K), or (N, 2K) for SWIGLU, rows x_stride apart. Returns 1 where memory
ran out. */
int luciola_linear(const Call *call)
{
    const Matrix *w = call->w;
    const float *x = call->x;
    const ptrdiff_t N = call->N, x_stride = call->x_stride;
    const ptrdiff_t unit = w->groups ? (ptrdiff_t)1 << w->shift : LANES, padded = (w->K + unit - 1) / unit * unit;
    const int ready = w->f == IDENTITY && padded == w->K;
    float *prepared = ready ? NULL : aligned_alloc(64, (N * padded * sizeof(float) + 63) / 64 * 64 + 64);
    if (!ready && prepared == NULL)
        return 1;
    const Product p = {
        w, call->y, ready ? x : prepared, call->residual, N, w->groups ? padded : w->K, ready ? x_stride : padded};
    /* Waking a second thread costs microseconds: below ten of work, reading or multiplying, it is left asleep. */
    const int alone = (double)w->M * w->stride / 50e3 + (double)N * w->M * w->K / 75e3 < 10;
#pragma omp parallel if (!alone)
    {
        if (!ready) {
#pragma omp for schedule(static)
            for (ptrdiff_t r = 0; r < N; r++)
                prepare(prepared + r * padded, x + r * x_stride, padded, w);
        }
#pragma omp for schedule(static) nowait
        for (ptrdiff_t m = 0; m < w->M; m += OUTPUTS)
            tile(&p, m);
    }
    free(prepared);
    return 0;
}
