/* Small products of float32 vectors with rows of memory (float32 or bfloat16), and a vectorised exponential.

   `dots` and `mix` are the two halves of attention, and of every product with few rows: out_hp = x_h . row_p, and
   out_h = sum over p of w_hp row_p. Each sum is taken in one order, whatever the tile it falls into: lane by lane along
   the row and then across the lanes, or row after row. So a vector's result depends on nothing that is computed beside
   it. All x and out are padded with zeros to whole vectors; rows are not.

   Names: H vectors on the left (heads, or tokens), p rows on the right, `at` the element of a row where it begins. */
#pragma once

/* The order of sums is part of the meaning here, whatever the other files are compiled with. */
#if defined(__clang__)
#pragma clang fp reassociate(off)
#else
#pragma GCC optimize("no-associative-math")
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

/* As wide as the processor's vectors: what is wider the compilers take apart through memory. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t loose_half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
/* LANES of a and b by number; the lists are written for 16, and narrower vectors take their beginning (in the branches
   that they never come to, numbers there are none of: % for clang's sake). */
#if LANES == 16
#define PICK SHUFFLE
#elif LANES == 8
#define PICK(a, b, i, j, k, l, m, n, o, p, ...) \
    SHUFFLE(a, b, i % 16, j % 16, k % 16, l % 16, m % 16, n % 16, o % 16, p % 16)
#else
#define PICK(a, b, i, j, k, l, ...) SHUFFLE(a, b, i % 8, j % 8, k % 8, l % 8)
#endif

/* A tile of sums fits into the vector registers: TILE vectors on the left by ACROSS rows, or columns of rows. */
#ifdef __AVX512F__
enum { TILE = 4 };
#else
enum { TILE = 2 };
#endif
enum { ACROSS = 4 };
enum { GROUP = 16 };  /* vectors on the left whose partial sums are kept on the stack */
enum { ROWS = 64 };   /* the most rows of a sum */
enum { DEEP = LANES };  /* rows whose sums, with vectors in the lanes, fit into the vector registers */
enum { BLOCK = 128 }; /* numbers of them that stay in the first cache together with as many rows */

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t padded(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

INLINE vec load(const float *x) { return *(const loose_vec *)x; }

INLINE void store(float *x, vec v) { *(loose_vec *)x = v; }

INLINE vec all(float x) { return (vec){} + x; }

INLINE vec madd(vec a, vec b, vec c) {
#ifdef __AVX512F__
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

/* LANES numbers of a row from number i on, or `count` of them and zeros. */
INLINE vec row_load(const void *row, int64_t i, int64_t count, int half) {
    if (half) {
        loose_half h = {0};
        if (count < LANES)
            memcpy(&h, (const uint16_t *)row + i, 2 * count);
        else
            h = *(const loose_half *)((const uint16_t *)row + i);
        return (vec)(__builtin_convertvector(h, uvec) << 16);
    }
    if (count < LANES) {
        vec v = {0};
        memcpy(&v, (const float *)row + i, 4 * count);
        return v;
    }
    return load((const float *)row + i);
}

/* Rows lie too far apart for the processor to guess the next one. */
INLINE void fetch(const void *row, int64_t i, int64_t count, int half) {
    const char *from = (const char *)row + i * (half ? 2 : 4);
    for (int64_t byte = 0; byte < count * (half ? 2 : 4); byte += 64) __builtin_prefetch(from + byte);
}

/* What will be wanted next, fetched bit by bit during a long product: many lines at once would wait for each other. */
typedef struct {
    const void *const *rows;
    int64_t left, byte, bytes; /* rows still to be fetched, the first of them from `byte` on; bytes of a row */
} Ahead;

INLINE void fetch_line(Ahead *a) {
    if (!a || !a->left) return;
    __builtin_prefetch((const char *)*a->rows + a->byte);
    if ((a->byte += 64) >= a->bytes) a->byte = 0, a->left--, a->rows++;
}

/* `count` numbers of a row as float32, padded with zeros; returns `to`. */
INLINE const vec *widen(vec *to, const void *row, int64_t i, int64_t count, int half) {
    for (int64_t j = 0; j < count; j += LANES) to[j / LANES] = row_load(row, i + j, smaller(LANES, count - j), half);
    return to;
}

/* float32 to bfloat16, to the nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE void row_store(void *row, int64_t i, float x, int half) {
    if (half)
        ((uint16_t *)row)[i] = to_half(x);
    else
        ((float *)row)[i] = x;
}

/* Lane i of the result: the sum of the lanes of v[i]. */
INLINE vec sums(const vec *v) {
    vec s[LANES];
    for (int i = 0; i < LANES; i++) s[i] = v[i];
    if (LANES > 8)
        for (int i = 0; i < LANES / 2; i++)
            s[i] = PICK(s[2 * i], s[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   PICK(s[2 * i], s[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    if (LANES > 4)
        for (int i = 0; i < 4; i++)
            s[i] = PICK(s[2 * i], s[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                   PICK(s[2 * i], s[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        s[i] = PICK(s[2 * i], s[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
               PICK(s[2 * i], s[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    return PICK(s[0], s[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           PICK(s[0], s[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

INLINE float sum_lanes(vec v) {
    if (LANES > 8) v += PICK(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    if (LANES > 4) v += PICK(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += PICK(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return v[0] + v[1];
}

INLINE vec greater(vec a, vec b) { return (vec)(((a > b) & (ivec)a) | (~(a > b) & (ivec)b)); }

INLINE float max_lanes(vec v) {
    if (LANES > 8) v = greater(v, PICK(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    if (LANES > 4) v = greater(v, PICK(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = greater(v, PICK(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return v[0] > v[1] ? v[0] : v[1];
}

/* e^x to 2e-7 relative: 0 below -87 and infinite above 88; NaN stays NaN. x = k ln 2 + r with |r| <= ln 2 / 2, then
   Taylor's polynomial of degree 7 in r. ln 2 comes in two parts, the first of so few bits that k times it is exact. */
INLINE vec vexp(vec x) {
    ivec low = x < -87.0f, high = x > 88.0f;
    vec in = (vec)(~(low | high) & (ivec)x); /* 0 where the result is known */
    vec nearest = 0.5f + (vec)((in < 0) & (ivec)all(-1.0f)); /* conversion cuts towards zero */
    ivec k = __builtin_convertvector(madd(in, all(1.44269504f), nearest), ivec);
    vec turns = __builtin_convertvector(k, vec);
    vec r = madd(turns, all(-0.693145752f), in);
    r = madd(turns, all(-1.42860677e-6f), r);
    vec p = all(1.0f / 5040);
    p = madd(p, r, all(1.0f / 720));
    p = madd(p, r, all(1.0f / 120));
    p = madd(p, r, all(1.0f / 24));
    p = madd(p, r, all(1.0f / 6));
    p = madd(p, r, all(0.5f));
    p = madd(p, r, all(1.0f));
    p = madd(p, r, all(1.0f));
    vec y = p * (vec)((k + 127) << 23);
    y = (vec)(~low & (ivec)y);
    return (vec)((~high & (ivec)y) | (high & (ivec)all(INFINITY)));
}

INLINE float exp1(float x) { return vexp(all(x))[0]; }

/* x / sqrt(mean x^2 + eps) * weight */
static inline void rms_norm(float *out, const float *x, const float *weight, int64_t width, float eps) {
    vec squares = {0};
    for (int64_t i = 0; i < width; i += LANES) {
        vec v = row_load(x, i, smaller(LANES, width - i), 0);
        squares = madd(v, v, squares);
    }
    float r = 1.0f / sqrtf(sum_lanes(squares) / width + eps);
    for (int64_t i = 0; i < width; i++) out[i] = x[i] * r * weight[i];
}

/* H <= TILE vectors, from number `from` on, against ACROSS rows; the sums, one vector each, in part[h][LANES rows]. */
INLINE void dots_tile(const int H, const int half, vec *part, const float *const *x, int64_t from,
                      const void *const *rows, int64_t at, int64_t width) {
    vec sum[TILE][ACROSS];
    int64_t i = 0;
    for (int h = 0; h < H; h++)
        for (int p = 0; p < ACROSS; p++) sum[h][p] = from ? part[h * LANES + p] : (vec){0};
    for (; i + LANES <= width; i += LANES) {
        vec r[ACROSS];
        for (int p = 0; p < ACROSS; p++) r[p] = row_load(rows[p], at + from + i, LANES, half);
        for (int h = 0; h < H; h++) {
            vec v = load(x[h] + from + i);
            for (int p = 0; p < ACROSS; p++) sum[h][p] = madd(v, r[p], sum[h][p]);
        }
    }
    if (i < width)
        for (int p = 0; p < ACROSS; p++) {
            vec r = row_load(rows[p], at + from + i, width - i, half);
            for (int h = 0; h < H; h++) sum[h][p] = madd(load(x[h] + from + i), r, sum[h][p]);
        }
    for (int h = 0; h < H; h++)
        for (int p = 0; p < ACROSS; p++) part[h * LANES + p] = sum[h][p];
}

INLINE void dots_heads(const int half, vec *part, const float *const *x, int64_t heads, int64_t from,
                       const void *const *rows, int64_t at, int64_t width) {
    for (int64_t h = 0; h < heads; h += TILE) {
        vec *to = part + h * LANES;
        int64_t rest = heads - h;
        if (rest >= TILE)
            dots_tile(TILE, half, to, x + h, from, rows, at, width);
        else if (rest == 1)
            dots_tile(1, half, to, x + h, from, rows, at, width);
        else if (rest == 2)
            dots_tile(2, half, to, x + h, from, rows, at, width);
        else
            dots_tile(TILE - 1, half, to, x + h, from, rows, at, width);
    }
}

/* LANES rows against all vectors, for so much of their width that both stay in the first cache. */
INLINE void dots_of(const int half, float *out, int64_t out_stride, const float *const *x, int64_t heads,
                    const void *const *rows, int64_t count, int64_t at, int64_t width) {
    vec part[GROUP * LANES], wide[ACROSS * BLOCK / LANES];
    int64_t block = heads > TILE ? BLOCK : width;
    for (int64_t p0 = 0; p0 < count; p0 += LANES) {
        const void *tile[LANES]; /* past the end stands the last row again: its products are not used */
        int64_t some = smaller(LANES, count - p0);
        for (int64_t p = 0; p < LANES; p++) tile[p] = rows[p0 + smaller(p, some - 1)];
        for (int64_t h = 0; h < heads; h++)
            for (int64_t p = some; p < LANES; p++) part[h * LANES + p] = (vec){0};
        for (int64_t from = 0; from < width; from += block) {
            int64_t span = smaller(block, width - from);
            for (int64_t p = 0; p < some; p += ACROSS) {
                for (int64_t next = p0 + p + LANES, end = smaller(next + ACROSS, count); next < end; next++)
                    fetch(rows[next], at + from, span, half);
                if (half && heads > TILE) { /* converted once for all vectors */
                    const void *widened[ACROSS];
                    for (int j = 0; j < ACROSS; j++)
                        widened[j] = widen(wide + j * BLOCK / LANES, tile[p + j], at + from, span, half);
                    dots_heads(0, part + p, x, heads, from, widened, -from, padded(span));
                } else
                    dots_heads(half, part + p, x, heads, from, tile + p, at, span);
            }
        }
        for (int64_t h = 0; h < heads; h++) store(out + h * out_stride + p0, sums(part + h * LANES));
    }
}

/* out[h][p] = x[h] . rows[p][at : at + width] for `heads` <= GROUP; writes whole vectors: out has padded(count). */
static inline void dots(float *out, int64_t out_stride, const float *const *x, int64_t heads, const void *const *rows,
                        int64_t count, int64_t at, int64_t width, int half) {
    if (half)
        dots_of(1, out, out_stride, x, heads, rows, count, at, width);
    else
        dots_of(0, out, out_stride, x, heads, rows, count, at, width);
}

/* DEEP rows against LANES vectors, each in a lane of its own. x_T is transposed: number i of all vectors at
   x_T + i * heads. */
INLINE void dots_lanes(const int half, float *out, int64_t out_stride, const float *x_T, int64_t heads,
                       const void *const *rows, int64_t count, int64_t at, int64_t width, Ahead *ahead) {
    vec wide[DEEP][BLOCK / LANES], sum[DEEP]; /* copied, for the registers have no room for as many pointers */
    for (int p = 0; p < DEEP; p++) sum[p] = (vec){0};
    for (int64_t from = 0; from < width; from += BLOCK) {
        int64_t span = smaller(BLOCK, width - from);
        for (int64_t p = 0; p < count; p++) widen(wide[p], rows[p], at + from, span, half);
        const float *of = (const float *)wide, *x = x_T + from * heads;
        for (int64_t i = 0; i < span; i++, x += heads) {
            vec v = load(x);
            if (i % 2) fetch_line(ahead);
            for (int p = 0; p < DEEP; p++) sum[p] = madd(all(of[p * BLOCK + i]), v, sum[p]);
        }
    }
    for (int64_t p = 0; p < count; p++)
        for (int h = 0; h < LANES; h++) out[h * out_stride + p] = sum[p][h];
}

/* `dots` of whole vectors of heads, x_T (width, heads): no sum runs across lanes. */
static inline void dots_transposed(float *out, int64_t out_stride, const float *x_T, int64_t heads,
                                   const void *const *rows, int64_t count, int64_t at, int64_t width, int half,
                                   Ahead *ahead) {
    for (int64_t p = 0; p < count; p += DEEP)
        for (int64_t h = 0; h < heads; h += LANES) {
            float *to = out + h * out_stride + p;
            if (half)
                dots_lanes(1, to, out_stride, x_T + h, heads, rows + p, smaller(DEEP, count - p), at, width, ahead);
            else
                dots_lanes(0, to, out_stride, x_T + h, heads, rows + p, smaller(DEEP, count - p), at, width, ahead);
        }
}

/* H <= TILE vectors of weights over all rows, for `columns` vectors of them, the last of `last` numbers. */
INLINE void mix_tile(const int H, const int columns, const int whole, const int half, float *out, int64_t out_stride,
                     const float *keep, const float *w, int64_t w_stride, const void *const *rows, int64_t count,
                     int64_t at, int64_t last, Ahead *ahead) {
    vec sum[TILE][ACROSS];
    for (int h = 0; h < H; h++)
        for (int c = 0; c < columns; c++)
            sum[h][c] = keep ? load(out + h * out_stride + c * LANES) * keep[h] : (vec){0};
    for (int64_t p = 0; p < count; p++) {
        vec r[ACROSS];
        for (int c = 0; c < columns; c++) r[c] = row_load(rows[p], at + c * LANES, whole ? LANES : last, half);
        if (p % 2) fetch_line(ahead);
        for (int h = 0; h < H; h++) {
            vec weight = all(w[h * w_stride + p]);
            for (int c = 0; c < columns; c++) sum[h][c] = madd(weight, r[c], sum[h][c]);
        }
    }
    for (int h = 0; h < H; h++)
        for (int c = 0; c < columns; c++) store(out + h * out_stride + c * LANES, sum[h][c]);
}

INLINE void mix_columns(const int H, const int half, float *out, int64_t out_stride, const float *keep, const float *w,
                        int64_t w_stride, const void *const *rows, int64_t count, int64_t at, int64_t width,
                        Ahead *ahead) {
    int64_t i = 0;
    for (; i + ACROSS * LANES <= width; i += ACROSS * LANES)
        mix_tile(H, ACROSS, 1, half, out + i, out_stride, keep, w, w_stride, rows, count, at + i, LANES, ahead);
    for (; i + LANES <= width; i += LANES)
        mix_tile(H, 1, 1, half, out + i, out_stride, keep, w, w_stride, rows, count, at + i, LANES, ahead);
    if (i < width)
        mix_tile(H, 1, 0, half, out + i, out_stride, keep, w, w_stride, rows, count, at + i, width - i, ahead);
}

INLINE void mix_heads(const int half, float *out, int64_t out_stride, const float *keep, const float *w,
                      int64_t w_stride, int64_t heads, const void *const *rows, int64_t count, int64_t at,
                      int64_t width, Ahead *ahead) {
    for (int64_t h = 0; h < heads; h += TILE) {
        float *to = out + h * out_stride;
        const float *kept = keep ? keep + h : keep, *weights = w + h * w_stride;
        int64_t rest = heads - h;
        if (rest >= TILE)
            mix_columns(TILE, half, to, out_stride, kept, weights, w_stride, rows, count, at, width, ahead);
        else if (rest == 1)
            mix_columns(1, half, to, out_stride, kept, weights, w_stride, rows, count, at, width, ahead);
        else if (rest == 2)
            mix_columns(2, half, to, out_stride, kept, weights, w_stride, rows, count, at, width, ahead);
        else
            mix_columns(TILE - 1, half, to, out_stride, kept, weights, w_stride, rows, count, at, width, ahead);
    }
}

INLINE void mix_of(const int half, float *out, int64_t out_stride, const float *keep, const float *w, int64_t w_stride,
                   int64_t heads, const void *const *rows, int64_t count, int64_t at, int64_t width,
                        Ahead *ahead) {
    if (heads <= TILE) {
        mix_heads(half, out, out_stride, keep, w, w_stride, heads, rows, count, at, width, ahead);
        return;
    }
    for (int64_t i = 0; i < width; i += ACROSS * LANES) { /* so many columns of all rows stay in the first cache */
        int64_t span = smaller(ACROSS * LANES, width - i);
        if (half) {
            vec wide[ROWS * ACROSS];
            const void *widened[ROWS];
            for (int64_t p = 0; p < count; p++) widened[p] = widen(wide + p * ACROSS, rows[p], at + i, span, half);
            mix_heads(0, out + i, out_stride, keep, w, w_stride, heads, widened, count, 0, padded(span), ahead);
        } else
            mix_heads(0, out + i, out_stride, keep, w, w_stride, heads, rows, count, at + i, span, ahead);
    }
}

/* out_h = keep_h out_h + sum over p < count <= ROWS of w_hp rows[p][at : at + width]; without `keep` what out held
   is gone. Writes whole vectors: out has padded(width). */
static inline void mix(float *out, int64_t out_stride, const float *keep, const float *w, int64_t w_stride,
                       int64_t heads, const void *const *rows, int64_t count, int64_t at, int64_t width, int half,
                       Ahead *ahead) {
    if (half)
        mix_of(1, out, out_stride, keep, w, w_stride, heads, rows, count, at, width, ahead);
    else
        mix_of(0, out, out_stride, keep, w, w_stride, heads, rows, count, at, width, ahead);
}
