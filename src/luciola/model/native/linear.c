/* y = W f(x): a few rows against a matrix, f the identity, RMSNorm, or SwiGLU's product of two halves.

One row costs what reading W costs; sixteen rows share what is read. Sums are kept for a tile of ROWS x OUTPUTS, enough
of them at once to keep the multipliers busy. However many rows there are, and whatever the tile, one output of one row
is always computed alike: sixteen lanes, each adding its products in ascending order, then the tree of `sums_of_8`. So a
row's result does not depend on its neighbours, nor on the number of threads.

W is float32, bfloat16, or quantised in groups along its rows: int8 with a scale, or int4 with a scale and a minimum.
What is multiplied is always the same float32 number, decoded on the way for few rows, and once for all where there are
more. */
#include "vector.h"

#include <math.h>
#include <stdlib.h>

enum { FLOAT32, BFLOAT16, INT8, INT4 };
enum { IDENTITY, NORM, NORM_BFLOAT16, SWIGLU };
#ifdef AVX512
enum { ROWS = 3, OUTPUTS = 8 };
#else
enum { ROWS = 1, OUTPUTS = 8 };
#endif
enum {
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

/* Sixteen weights from number k of a row on; of INT4 those whose nibbles are `high` or low in their sixteen bytes. */
INLINE f32x16 weights(const int kind, const char *row, ptrdiff_t k, float scale, float minimum, int high)
{
    if (kind == FLOAT32)
        return load(row + 4 * k);
    if (kind == BFLOAT16)
        return load_bf16((const uint16_t *)row + k);
    if (kind == INT8)
        return load_int8((const int8_t *)row + k) * scale;
    u8x16 bytes;
    memcpy(&bytes, row + k / 2, sizeof bytes);
#ifdef AVX512
    /* The sixteen values a nibble can mean, looked up sixteen times in one instruction, which ignores higher bits. */
    const f32x16 count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i wide = _mm512_cvtepu8_epi32((__m128i)bytes);
    return (f32x16)_mm512_permutexvar_ps(high ? _mm512_srli_epi32(wide, 4) : wide, (__m512)(count * scale + minimum));
#else
    bytes = high ? bytes >> 4 : bytes & 15;
    return __builtin_convertvector(__builtin_convertvector(bytes, i32x16), f32x16) * scale + minimum;
#endif
}

/* sums[row][output] += x . w over n numbers, whole vectors. `kind` and `rows` are constants where this is inlined. */
INLINE void dot(const int kind, const int rows, f32x16 (*sums)[OUTPUTS], const float *x, ptrdiff_t x_stride,
                const char *const *w, const Groups *groups, int shift, ptrdiff_t n)
{
    const int halves = kind == INT4 ? 2 : 1; /* of a byte, which are vectors apart */
    f32x16 s[ROWS][OUTPUTS], v[2][ROWS];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int o = 0; o < OUTPUTS; o++)
            s[r][o] = sums[r][o];
    for (ptrdiff_t k = 0; k < n; k += halves * LANES) {
        for (int high = 0; high < halves; high++)
            for (int r = 0; r < rows; r++)
                v[high][r] = load(x + r * x_stride + k + high * LANES);
        UNROLL
        for (int o = 0; o < OUTPUTS; o++) {
            const float scale = kind >= INT8 ? groups->scale[o][k >> shift] : 0;
            const float minimum = kind == INT4 ? groups->minimum[o][k >> shift] : 0;
            for (int high = 0; high < halves; high++) {
                f32x16 weight = weights(kind, w[o], k, scale, minimum, high);
                if (rows > 1)
                    keep(&weight); /* else GCC loads it anew for each row */
                for (int r = 0; r < rows; r++)
                    s[r][o] += v[high][r] * weight;
            }
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int o = 0; o < OUTPUTS; o++)
            sums[r][o] = s[r][o];
}

#define DOTS(KIND)                                                                                                     \
    static void dot_##KIND(int rows, f32x16 (*sums)[OUTPUTS], const float *x, ptrdiff_t x_stride,                      \
                           const char *const *w, const Groups *groups, int shift, ptrdiff_t n)                         \
    {                                                                                                                  \
        for (; rows >= ROWS; rows -= ROWS, sums += ROWS, x += ROWS * x_stride)                                         \
            dot(KIND, ROWS, sums, x, x_stride, w, groups, shift, n);                                                   \
        if (rows == 2)                                                                                                 \
            dot(KIND, ROWS < 2 ? ROWS : 2, sums, x, x_stride, w, groups, shift, n);                                    \
        if (rows == 1)                                                                                                 \
            dot(KIND, 1, sums, x, x_stride, w, groups, shift, n);                                                      \
    }
DOTS(FLOAT32)
DOTS(BFLOAT16)
DOTS(INT8)
DOTS(INT4)

/* n numbers of a row, whole vectors, as float32. */
INLINE void decode(const int kind, float *to, const char *row, const float *scales, const float *minima, int shift,
                   ptrdiff_t n)
{
    for (ptrdiff_t k = 0; k < n; k += kind == INT4 ? 2 * LANES : LANES)
        for (int high = 0; high < (kind == INT4 ? 2 : 1); high++)
            store(to + k + high * LANES, weights(kind, row, k, scales[k >> shift], minima[k >> shift], high));
}

/* OUTPUTS outputs of all rows, from output m on. */
static void tile(const Product *p, ptrdiff_t m)
{
    const Matrix *w = p->w;
    const ptrdiff_t here = w->M - m < OUTPUTS ? w->M - m : OUTPUTS;
    const ptrdiff_t bytes_of_8 = w->kind == FLOAT32 ? 32 : w->kind == BFLOAT16 ? 16 : w->kind == INT8 ? 8 : 4;
    f32x16 sums[BATCH][OUTPUTS];
    float panel[OUTPUTS][SPAN] __attribute__((aligned(64)));
    Groups groups;
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
                dot_FLOAT32(rows, sums, x, p->x_stride, row, &groups, 0, n);
            else if (kind == BFLOAT16)
                dot_BFLOAT16(rows, sums, x, p->x_stride, row, &groups, 0, n);
            else if (kind == INT8)
                dot_INT8(rows, sums, x, p->x_stride, row, &groups, w->shift, n);
            else
                dot_INT4(rows, sums, x, p->x_stride, row, &groups, w->shift, n);
            if (n < left) {
                for (int o = 0; o < OUTPUTS; o++) {
                    store(panel[o], w->kind == FLOAT32 ? load_some((const float *)end[o], left - n)
                                                       : load_some_bf16((const uint16_t *)end[o], left - n));
                    row[o] = (const char *)panel[o];
                }
                dot_FLOAT32(rows, sums, x + n, p->x_stride, row, &groups, 0, LANES);
            }
        }
        for (int r = 0; r < rows; r++) {
            const f32x16 y = sums_of_8(sums[r]);
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

/* f(x) of one row, followed by zeros up to `padded` numbers, whole vectors. */
static void prepare(float *to, const float *x, ptrdiff_t padded, const Matrix *w)
{
    const ptrdiff_t K = w->K, whole = K / LANES * LANES, rest = K - whole;
    float r = 1;
    if (w->f == NORM || w->f == NORM_BFLOAT16) {
        const f32x16 last = load_some(x + whole, rest);
        f32x16 squares = last * last;
        for (ptrdiff_t k = 0; k < whole; k += LANES)
            squares += load(x + k) * load(x + k);
        r = 1 / sqrtf(sum(squares) / (float)K + w->eps);
    }
    const float *norm = w->norm;
    const uint16_t *norm_bf16 = w->norm;
    for (ptrdiff_t k = 0; k < padded; k += LANES) {
        const ptrdiff_t n = k < K ? K - k : 0;
        f32x16 v = n < LANES ? load_some(x + k, n) : load(x + k);
        if (w->f == NORM)
            v = v * r * (n < LANES ? load_some(norm + k, n) : load(norm + k));
        else if (w->f == NORM_BFLOAT16)
            v = v * r * (n < LANES ? load_some_bf16(norm_bf16 + k, n) : load_bf16(norm_bf16 + k));
        else if (w->f == SWIGLU)
            v = silu(v) * (n < LANES ? load_some(x + K + k, n) : load(x + K + k));
        store(to + k, v);
    }
}

/* Memory for f(x), kept for the next call of the same thread; NULL where there is none. */
static float *scratch(size_t floats)
{
    static _Thread_local float *kept;
    static _Thread_local size_t size;
    if (floats > size) {
        free(kept);
        kept = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        size = kept == NULL ? 0 : floats;
    }
    return kept;
}

/* y (N, M) = W f(x) + bias + residual, with x (N, K), or (N, 2K) for SWIGLU. Returns 0 where memory ran out. */
int luciola_linear(float *y, const float *x, const float *residual, ptrdiff_t N, const Matrix *w)
{
    const ptrdiff_t unit = w->groups ? (ptrdiff_t)1 << w->shift : LANES, padded = (w->K + unit - 1) / unit * unit;
    const ptrdiff_t x_stride = w->f == SWIGLU ? 2 * w->K : w->K;
    const int ready = w->f == IDENTITY && padded == w->K;
    float *prepared = ready ? NULL : scratch(N * padded);
    if (!ready && prepared == NULL && N > 0)
        return 0;
    const Product p = {w, y, ready ? x : prepared, residual, N, w->groups ? padded : w->K, padded};
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
    return 1;
}
