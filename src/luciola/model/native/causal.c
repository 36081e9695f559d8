/* Causal attention of whole sequences, and its gradients. The formulas stand in causal.py.

   A row is worked through a block of queries at a time, against all keys up to its end: scores and weights of a block
   stay in the second cache and are computed again for the gradients. Rows that begin with the same tokens follow each
   other; what is packed of the shared beginning, and the gradients of its keys, are then kept from row to row.

   One thread takes all rows of a family (those with a common beginning) for one key-value head, so that no gradient is
   shared between threads and no bit depends on how many there are.

   Names: t queries, s keys, H query heads of which R share each of G key-value heads, D width of keys, V of values. */
#include <omp.h>
#include <stdlib.h>

#include "rows.h"

enum { DONE, NO_MEMORY };
enum { QUERIES = 24 }; /* of a block */
#ifdef __AVX512F__
enum { DOWN = 6, WIDE = 4 }; /* a tile of sums that fits into the vector registers: rows by vectors */
#else
enum { DOWN = 4, WIDE = 2 };
#endif

typedef struct { /* a tensor of heads: numbers from one row, token and head to the next; widths are dense */
    float *at;
    int64_t row, token, head;
} Heads;

typedef struct { /* causal.py fills it */
    Heads q, k, v, o, g, dq, dk, dv; /* the last four for gradients only */
    float *logsum;                   /* log sum e^s of each token and head */
    const int64_t *tokens;           /* number of each slot's token, row after row; NULL: row b has its own, 0, 1, ... */
    const int64_t *starts;           /* where each row begins among the slots, and the end of the last */
    const int64_t *shared;           /* how many tokens each row has in common with the one before; NULL: none */
    const int64_t *begins;           /* the first key that the token in each slot may see; NULL: all */
    int64_t rows, heads, kv_heads, width, v_width, window; /* window 0: none */
    float scale;
} Causal;

typedef struct { /* of one thread; every row of numbers is padded to whole vectors */
    float *k, *v, *k_T, *v_T;   /* keys and values of a row, (s, D) and (s, V), and transposed, `across` to a line */
    float *dk, *dv;             /* the gradients of its keys and values so far */
    float *q, *g, *s, *ds, *o;  /* of a block of queries */
    int64_t across, D, V;       /* padded: longest row, D, V */
    void *memory;
} Scratch;

INLINE void tile(const int down, const int wide, float *c, int64_t c_down, const float *a, int64_t a_down,
                 int64_t a_along, const float *b, int64_t b_along, int64_t count, int add) {
    vec sum[DOWN][WIDE];
    for (int i = 0; i < down; i++)
        for (int j = 0; j < wide; j++) sum[i][j] = add ? load(c + i * c_down + j * LANES) : (vec){0};
    for (int64_t p = 0; p < count; p++) {
        vec row[WIDE];
        for (int j = 0; j < wide; j++) row[j] = load(b + p * b_along + j * LANES);
        for (int i = 0; i < down; i++) {
            vec x = all(a[i * a_down + p * a_along]);
            for (int j = 0; j < wide; j++) sum[i][j] = madd(x, row[j], sum[i][j]);
        }
    }
    for (int i = 0; i < down; i++)
        for (int j = 0; j < wide; j++) store(c + i * c_down + j * LANES, sum[i][j]);
}

#define DOWN_BY(wide)                                                                              \
    switch (down) {                                                                                \
    case 1: tile(1, wide, c, c_down, a, a_down, a_along, b, b_along, count, add); break;           \
    case 2: tile(2, wide, c, c_down, a, a_down, a_along, b, b_along, count, add); break;           \
    case 3: tile(3, wide, c, c_down, a, a_down, a_along, b, b_along, count, add); break;           \
    case 4: tile(4, wide, c, c_down, a, a_down, a_along, b, b_along, count, add); break;           \
    case 5: tile(DOWN < 5 ? 1 : 5, wide, c, c_down, a, a_down, a_along, b, b_along, count, add); break; \
    default: tile(DOWN, wide, c, c_down, a, a_down, a_along, b, b_along, count, add);              \
    }

static void tile_of(int64_t down, int64_t wide, float *c, int64_t c_down, const float *a, int64_t a_down,
                    int64_t a_along, const float *b, int64_t b_along, int64_t count, int add) {
    if (wide >= WIDE)
        DOWN_BY(WIDE)
    else if (wide == 1)
        DOWN_BY(1)
    else if (wide == 2)
        DOWN_BY(2)
    else
        DOWN_BY(WIDE - 1)
}

/* The three products of attention. Queries are numbered from the first of the block, keys from the first in sight,
   which stands `later` places after that query (or before it: then it is negative). Of the pairs in which the key comes
   after the query most are left out; where they are not, their weights are 0. */

/* s_ij = x_i . y_j for queries i and keys j, of y_T transposed. Whole vectors of keys. */
static void dot(float *s, const float *x, int64_t width, int64_t x_down, const float *y_T, int64_t across,
                int64_t queries, int64_t keys, int64_t later) {
    for (int64_t j = 0; j < keys; j += WIDE * LANES)
        for (int64_t i = j + later > 0 ? (j + later) / DOWN * DOWN : 0; i < queries; i += DOWN)
            tile_of(smaller(DOWN, queries - i), smaller(WIDE, (keys - j + LANES - 1) / LANES), s + i * across + j,
                    across, x + i * x_down, x_down, 1, y_T + j, across, width, 0);
}

/* out_i = sum of p_ij y_j over the keys j, for queries i. */
static void gather(float *out, const float *p, int64_t across, const float *y, int64_t width, int64_t queries,
                   int64_t keys, int64_t later) {
    for (int64_t j = 0; j < width; j += WIDE * LANES)
        for (int64_t i = 0; i < queries; i += DOWN)
            tile_of(smaller(DOWN, queries - i), smaller(WIDE, (width - j) / LANES), out + i * width + j, width,
                    p + i * across, across, 1, y + j, width, smaller(keys, i + DOWN - later), 0);
}

/* out_j += sum of p_ij x_i over the queries i, for keys j. */
static void scatter(float *out, const float *p, int64_t across, const float *x, int64_t width, int64_t queries,
                    int64_t keys, int64_t later) {
    for (int64_t l = 0; l < width; l += WIDE * LANES)
        for (int64_t j = 0; j < keys; j += DOWN) {
            int64_t i = j + later > 0 ? j + later : 0;
            tile_of(smaller(DOWN, keys - j), smaller(WIDE, (width - l) / LANES), out + j * width + l, width,
                    p + i * across + j, 1, across, x + i * width + l, width, queries - i, 1);
        }
}

static inline int64_t token(const Causal *c, int64_t b, int64_t t) {
    return c->tokens ? c->tokens[c->starts[b] + t] : t;
}

static inline float *numbers(const Causal *c, const Heads *x, int64_t b, int64_t t, int64_t h) {
    return x->at + b * x->row + token(c, b, t) * x->token + h * x->head;
}

static inline float *logsum(const Causal *c, int64_t b, int64_t t, int64_t h) {
    return c->logsum + ((c->tokens ? 0 : c->starts[b]) + token(c, b, t)) * c->heads + h;
}

static inline int64_t first_seen(const Causal *c, int64_t b, int64_t t) {
    int64_t first = c->begins ? c->begins[c->starts[b] + t] : 0, near = c->window ? t + 1 - c->window : 0;
    return near > first ? near : first;
}

static inline void copy(float *to, const float *from, int64_t width, int64_t whole, float scale) {
    for (int64_t i = 0; i < width; i++) to[i] = from[i] * scale;
    for (int64_t i = width; i < whole; i++) to[i] = 0;
}

static int reserve(Scratch *s, const Causal *c, int64_t longest, int gradients) {
    /* An odd number of vectors, for powers of two between the lines would crowd them into few sets of the cache. */
    int64_t across = padded(longest) | LANES, D = padded(c->width), V = padded(c->v_width), block = QUERIES;
    int64_t keys = across * (D + V), blocks = block * (D + 2 * V + 2 * across);
    *s = (Scratch){.across = across, .D = D, .V = V};
    s->memory = calloc(keys * (gradients ? 4 : 2) + blocks + LANES, 4);
    if (!s->memory) return 0;
    float *at = (float *)(((uintptr_t)s->memory + 4 * LANES - 1) / (4 * LANES) * (4 * LANES));
    s->k_T = at, at += across * D;
    s->v = at, at += across * V;
    s->q = at, at += block * D;
    s->g = at, at += block * V;
    s->o = at, at += block * V;
    s->s = at, at += block * across;
    s->ds = at, at += block * across;
    if (gradients) {
        s->k = at, at += across * D;
        s->v_T = at, at += across * V;
        s->dk = at, at += across * D;
        s->dv = at;
    }
    return 1;
}

/* Keys and values of row b from slot `from` on. */
static void pack(const Scratch *s, const Causal *c, int64_t b, int64_t g, int64_t from, int64_t length) {
    for (int64_t t = from; t < length; t++) {
        const float *k = numbers(c, &c->k, b, t, g), *v = numbers(c, &c->v, b, t, g);
        for (int64_t i = 0; i < c->width; i++) s->k_T[i * s->across + t] = k[i];
        copy(s->v + t * s->V, v, c->v_width, s->V, 1);
        if (!s->dk) continue;
        copy(s->k + t * s->D, k, c->width, s->D, 1);
        for (int64_t i = 0; i < c->v_width; i++) s->v_T[i * s->across + t] = v[i];
    }
}

/* The scores of the queries t0..t1 with the keys from k0 on, and queries scaled and padded in s->q. */
static void scores(const Scratch *s, const Causal *c, int64_t b, int64_t h, int64_t t0, int64_t t1, int64_t k0) {
    for (int64_t t = t0; t < t1; t++)
        copy(s->q + (t - t0) * s->D, numbers(c, &c->q, b, t, h), c->width, s->D, c->scale);
    dot(s->s + k0, s->q, c->width, s->D, s->k_T + k0, s->across, t1 - t0, t1 - k0, k0 - t0);
    for (int64_t t = t0; t < t1; t++) {
        float *of = s->s + (t - t0) * s->across;
        for (int64_t p = k0, end = first_seen(c, b, t); p < end; p++) of[p] = -INFINITY;
        for (int64_t p = t + 1; p < padded(t1); p++) of[p] = -INFINITY;
    }
}

static void forward(const Scratch *s, const Causal *c, int64_t b, int64_t h, int64_t t0, int64_t t1, int64_t k0) {
    scores(s, c, b, h, t0, t1, k0);
    for (int64_t t = t0; t < t1; t++) {
        float *of = s->s + (t - t0) * s->across;
        vec most = load(of + k0), total = {0};
        for (int64_t p = k0 + LANES; p <= t; p += LANES) most = greater(load(of + p), most);
        float max = max_lanes(most);
        for (int64_t p = k0; p < padded(t1); p += LANES) {
            vec e = p <= t ? vexp(load(of + p) - max) : (vec){0};
            store(of + p, e);
            total += e;
        }
        float sum = sum_lanes(total);
        *logsum(c, b, t, h) = max + logf(sum);
        for (int64_t p = k0; p <= t; p += LANES) store(of + p, load(of + p) * (1 / sum));
    }
    gather(s->o, s->s + k0, s->across, s->v + k0 * s->V, s->V, t1 - t0, t1 - k0, k0 - t0);
    for (int64_t t = t0; t < t1; t++)
        memcpy(numbers(c, &c->o, b, t, h), s->o + (t - t0) * s->V, 4 * c->v_width);
}

/* dV += P^T dO;  dS = P (dO V^T - dO . o);  dQ = scale dS K;  dK += dS^T scale Q */
static void backward(const Scratch *s, const Causal *c, int64_t b, int64_t h, int64_t t0, int64_t t1, int64_t k0) {
    int64_t queries = t1 - t0, keys = t1 - k0, later = k0 - t0;
    scores(s, c, b, h, t0, t1, k0);
    for (int64_t t = t0; t < t1; t++)
        copy(s->g + (t - t0) * s->V, numbers(c, &c->g, b, t, h), c->v_width, s->V, 1);
    dot(s->ds + k0, s->g, c->v_width, s->V, s->v_T + k0, s->across, queries, keys, later);
    for (int64_t t = t0; t < t1; t++) {
        float *p = s->s + (t - t0) * s->across, *ds = s->ds + (t - t0) * s->across, along = 0;
        const float *g = s->g + (t - t0) * s->V, *o = numbers(c, &c->o, b, t, h), sum = *logsum(c, b, t, h);
        for (int64_t i = 0; i < c->v_width; i++) along += g[i] * o[i];
        for (int64_t i = k0; i < padded(t1); i += LANES) {
            vec weight = i <= t ? vexp(load(p + i) - sum) : (vec){0};
            store(p + i, weight);
            store(ds + i, i <= t ? weight * (load(ds + i) - along) : weight);
        }
    }
    scatter(s->dv + k0 * s->V, s->s + k0, s->across, s->g, s->V, queries, keys, later);
    scatter(s->dk + k0 * s->D, s->ds + k0, s->across, s->q, s->D, queries, keys, later);
    gather(s->q, s->ds + k0, s->across, s->k + k0 * s->D, s->D, queries, keys, later);
    for (int64_t t = t0; t < t1; t++)
        copy(numbers(c, &c->dq, b, t, h), s->q + (t - t0) * s->D, c->width, 0, c->scale);
}

/* The gradients of keys and values from slot `from` on are complete: the next row does not have them. */
static void hand_over(const Scratch *s, const Causal *c, int64_t b, int64_t g, int64_t from, int64_t length) {
    for (int64_t t = from; t < length; t++) {
        memcpy(numbers(c, &c->dk, b, t, g), s->dk + t * s->D, 4 * c->width);
        memcpy(numbers(c, &c->dv, b, t, g), s->dv + t * s->V, 4 * c->v_width);
    }
    memset(s->dk + from * s->D, 0, 4 * (length - from) * s->D);
    memset(s->dv + from * s->V, 0, 4 * (length - from) * s->V);
}

/* The rows first..last, all with the same beginning, for key-value head g. */
static void family(const Scratch *s, const Causal *c, int64_t g, int64_t first, int64_t last) {
    int64_t R = c->heads / c->kv_heads;
    for (int64_t b = first; b < last; b++) {
        int64_t length = c->starts[b + 1] - c->starts[b], own = b == first ? 0 : c->shared[b];
        pack(s, c, b, g, own, length);
        for (int64_t t0 = own, t1; t0 < length; t0 = t1) {
            t1 = smaller(t0 + QUERIES, length);
            int64_t k0 = first_seen(c, b, t0); /* later queries see no earlier key */
            k0 -= k0 % LANES;
            for (int64_t h = g * R; h < (g + 1) * R; h++)
                (s->dk ? backward : forward)(s, c, b, h, t0, t1, k0);
        }
        if (s->dk) hand_over(s, c, b, g, b + 1 < last ? c->shared[b + 1] : 0, length);
    }
}

/* See causal.py. Gradients where `g` has memory, and the output otherwise. */
int luciola_causal(const Causal *c) {
    int64_t families = 0, longest = 0;
    int64_t *first = malloc((c->rows + 1) * sizeof *first);
    int failed = !first;
    if (failed) return NO_MEMORY;
    for (int64_t b = 0; b < c->rows; b++) {
        if (!b || !c->shared || !c->shared[b]) first[families++] = b;
        int64_t length = c->starts[b + 1] - c->starts[b];
        longest = length > longest ? length : longest;
    }
    first[families] = c->rows;
#pragma omp parallel
    {
        Scratch s;
        int ready = reserve(&s, c, longest, c->g.at != NULL);
#pragma omp atomic
        failed |= !ready;
#pragma omp for schedule(dynamic)
        for (int64_t piece = 0; piece < families * c->kv_heads; piece++) {
            int64_t f = piece / c->kv_heads;
            if (ready) family(&s, c, piece % c->kv_heads, first[f], first[f + 1]);
        }
        free(s.memory);
    }
    free(first);
    return failed ? NO_MEMORY : DONE;
}
