/* Attention of new tokens over a paged cache: grouped-query, and multi-head latent attention with the up-projections
   absorbed. The formulas stand in attention.py.

   A token's positions are cut into spans of SPAN at fixed places; a span is one piece of work, and goes through its
   positions CHUNK at a time with a running maximum. What the spans leave is put together in ascending order. Neither
   depends on the other tokens, on threads or on where blocks lie, so neither does a bit of the result.

   Names: n tokens, H query heads of which R share each of G heads in the cache, M blocks of a table. */
#include <omp.h>
#include <stdlib.h>

#include "rows.h"

enum { CHUNK = 64, SPAN = 512 };
enum { DONE, NO_MEMORY, OUTSIDE };
static const double WORTH_THREADS = 4e5;      /* multiplications, about 20 us on one core */
static const int64_t SCRATCH = 16 * 1024 * 1024; /* bytes aimed at: more tokens are taken in turns */

typedef struct { /* a pool of slots and what the tokens of the step see of it */
    void *pool;
    int half;
    int64_t slots, width;
    const int32_t *rows, *positions, *table;
    int64_t R, M, block;
    const float *cos, *sin;
    int64_t angles;
    int64_t window; /* 0: none */
} Paged;

typedef struct { /* where the heads' keys and values stand in a slot; head g's `*_width` numbers after those of g - 1 */
    int64_t heads, shared; /* shared: query heads to a cached head */
    int64_t key_width, values_at, value_width;
} Heads;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t first_seen(const Paged *c, int64_t n) {
    int64_t from = c->positions[n] + 1 - c->window;
    return c->window && from > 0 ? from : 0;
}

static inline int64_t spans_of(const Paged *c, int64_t n) {
    return c->positions[n] / SPAN - first_seen(c, n) / SPAN + 1;
}

static inline char *slot(const Paged *c, int64_t n, int64_t position) {
    int64_t block = c->table[c->rows[n] * c->M + position / c->block];
    return (char *)c->pool + (block * c->block + position % c->block) * c->width * (c->half ? 2 : 4);
}

static int inside(const Paged *c, int64_t tokens) {
    int64_t blocks = c->slots / c->block;
    for (int64_t n = 0; n < tokens; n++) {
        int64_t row = c->rows[n], position = c->positions[n];
        if (row < 0 || row >= c->R || position < 0 || position >= smaller(c->angles, c->M * c->block)) return 0;
        for (int64_t m = first_seen(c, n) / c->block; m <= position / c->block; m++)
            if (c->table[row * c->M + m] < 0 || c->table[row * c->M + m] >= blocks) return 0;
    }
    return 1;
}

static double scores_of(const Paged *c, int64_t tokens) {
    double seen = 0;
    for (int64_t n = 0; n < tokens; n++) seen += c->positions[n] + 1 - first_seen(c, n);
    return seen;
}

static void rms_norm(float *out, const float *x, const float *weight, int64_t width, float eps) {
    vec squares = {0};
    for (int64_t i = 0; i < width; i += LANES) {
        vec v = row_load(x, i, smaller(LANES, width - i), 0);
        squares = madd(v, v, squares);
    }
    float r = 1.0f / sqrtf(sum_lanes(squares) / width + eps);
    for (int64_t i = 0; i < width; i++) out[i] = x[i] * r * weight[i];
}

static void rotate(float *out, const float *x, const float *cos, const float *sin, int64_t width, int interleaved) {
    int64_t pairs = width / 2, step = interleaved ? 2 : 1, apart = interleaved ? 1 : pairs;
    for (int64_t i = 0; i < pairs; i++) {
        float a = x[i * step], b = x[i * step + apart];
        out[i * step] = a * cos[i] - b * sin[i];
        out[i * step + apart] = a * sin[i] + b * cos[i];
    }
}

/* One span of one token for `heads` <= GROUP heads that share the cached head g: o_h = sum of e^(s - max) v, max, sum. */
static void attend_span(const Paged *c, const Heads *k, int64_t n, int64_t g, int64_t heads, int64_t from, int64_t to,
                        const float *q, float *o, float *max, float *sum) {
    int64_t q_stride = padded(k->key_width), o_stride = padded(k->value_width);
    float s[GROUP * CHUNK], keep[GROUP];
    const void *rows[CHUNK];
    for (int64_t h = 0; h < heads; h++) max[h] = -INFINITY, sum[h] = 0;
    for (int64_t at = from; at < to;) {
        int64_t end = smaller(to, (at / CHUNK + 1) * CHUNK), count = end - at, first = at == from;
        for (int64_t p = 0; p < count;) { /* a block's slots lie one after the other */
            const char *row = slot(c, n, at + p);
            int64_t run = smaller(count, p + c->block - (at + p) % c->block);
            for (; p < run; p++, row += c->width * (c->half ? 2 : 4)) rows[p] = row;
        }
        dots(s, CHUNK, q, q_stride, heads, rows, count, g * k->key_width, k->key_width, c->half);
        for (int64_t h = 0; h < heads; h++) {
            float *of = s + h * CHUNK;
            for (int64_t p = count; p < padded(count); p++) of[p] = -INFINITY;
            vec most = load(of), total = {0};
            for (int64_t p = LANES; p < count; p += LANES) most = greater(load(of + p), most);
            float now = max_lanes(most);
            if (max[h] > now) now = max[h];
            for (int64_t p = 0; p < count; p += LANES) {
                vec e = vexp(load(of + p) - now);
                store(of + p, e);
                total += e;
            }
            keep[h] = first ? 0 : exp1(max[h] - now);
            sum[h] = sum[h] * keep[h] + sum_lanes(total);
            max[h] = now;
        }
        mix(o, o_stride, first ? NULL : keep, s, CHUNK, heads, rows, count, k->values_at + g * k->value_width,
            k->value_width, c->half);
        at = end;
    }
}

/* The spans of one head of a token as one: out = sum of e^(max_s - max) o_s / sum of e^(max_s - max) sum_s. */
static void join_spans(const Heads *k, int64_t spans, const float *o, const float *max, const float *sum, float *out) {
    int64_t width = padded(k->value_width), stride = k->heads * width;
    float most = max[0], total = 0, w[CHUNK], one = 1;
    const void *rows[CHUNK];
    for (int64_t s = 1; s < spans; s++)
        if (max[s * k->heads] > most) most = max[s * k->heads];
    for (int64_t s = 0; s < spans; s++) total += exp1(max[s * k->heads] - most) * sum[s * k->heads];
    for (int64_t s = 0; s < spans; s += CHUNK) {
        int64_t count = smaller(CHUNK, spans - s);
        for (int64_t i = 0; i < count; i++) {
            w[i] = exp1(max[(s + i) * k->heads] - most) / total;
            rows[i] = o + (s + i) * stride;
        }
        mix(out, width, s ? &one : NULL, w, CHUNK, 1, rows, count, 0, width, 0);
    }
}

typedef struct { /* scratch space of some tokens, cut from one piece of memory */
    float *q, *o, *max, *sum, *joined;
    int32_t *first; /* the first span of each token, and the end of the last */
    int32_t *token; /* of each span */
    void *memory;
} Scratch;

/* The tokens from `from` on that are worth SCRATCH bytes, at least one, and how many spans they have. */
static int64_t take(const Paged *c, const Heads *k, int64_t from, int64_t tokens, int64_t *spans) {
    int64_t of_token = k->heads * 4 * (padded(k->key_width) + padded(k->value_width)), bytes = 0, n = from;
    for (*spans = 0; n < tokens; n++) {
        int64_t more = spans_of(c, n);
        bytes += of_token + more * k->heads * 4 * (padded(k->value_width) + 2);
        if (n > from && bytes > SCRATCH) break;
        *spans += more;
    }
    return n;
}

static int reserve(Scratch *s, const Heads *k, int64_t tokens, int64_t spans) {
    int64_t q = tokens * k->heads * padded(k->key_width), o = spans * k->heads * padded(k->value_width);
    int64_t joined = tokens * k->heads * padded(k->value_width), marks = spans * k->heads;
    s->memory = malloc(4 * (q + o + joined + 2 * marks + tokens + 1 + spans) + 64);
    if (!s->memory) return 0;
    s->q = (float *)(((uintptr_t)s->memory + 63) / 64 * 64);
    s->o = s->q + q;
    s->joined = s->o + o;
    s->max = s->joined + joined;
    s->sum = s->max + marks;
    s->first = (int32_t *)(s->sum + marks);
    s->token = s->first + tokens + 1;
    return 1;
}

static void number_spans(Scratch *s, const Paged *c, int64_t from, int64_t to) {
    int32_t spans = 0;
    for (int64_t n = from; n < to; n++) {
        s->first[n - from] = spans;
        for (int64_t i = spans_of(c, n); i; i--) s->token[spans++] = (int32_t)(n - from);
    }
    s->first[to - from] = spans;
}

/* Inside a parallel region: the softmax over the cache for prepared queries (scaled, padded) of tokens from..to. */
static void attend(Scratch *s, const Paged *c, const Heads *k, int64_t from, int64_t to) {
    int64_t q_stride = padded(k->key_width), o_stride = padded(k->value_width);
    int64_t groups = (k->shared + GROUP - 1) / GROUP, pieces = k->heads / k->shared * groups;
#pragma omp for schedule(dynamic)
    for (int64_t piece = 0; piece < s->first[to - from] * pieces; piece++) {
        int64_t span = piece / pieces, g = piece % pieces / groups, head = piece % groups * GROUP;
        int64_t heads = smaller(GROUP, k->shared - head), h = g * k->shared + head;
        int64_t i = s->token[span], n = from + i, seen = first_seen(c, n);
        int64_t begin = (seen / SPAN + span - s->first[i]) * SPAN, end = smaller(begin + SPAN, c->positions[n] + 1);
        int64_t mark = span * k->heads + h;
        attend_span(c, k, n, g, heads, begin < seen ? seen : begin, end, s->q + (i * k->heads + h) * q_stride,
                    s->o + mark * o_stride, s->max + mark, s->sum + mark);
    }
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < (to - from) * k->heads; piece++) {
        int64_t i = piece / k->heads, mark = s->first[i] * k->heads + piece % k->heads;
        join_spans(k, s->first[i + 1] - s->first[i], s->o + mark * o_stride, s->max + mark, s->sum + mark,
                   s->joined + piece * o_stride);
    }
}

static int threads_for(double multiplications) {
    return multiplications < WORTH_THREADS ? 1 : omp_get_max_threads();
}

/* See gqa_attend in attention.py. `q_norm` and `k_norm` may be NULL. */
int luciola_gqa_attend(float *out, const float *qkv, int64_t qkv_stride, const float *q_norm, const float *k_norm,
                       float q_eps, float k_eps, void *pool, int half, int64_t slots, const int32_t *rows,
                       const int32_t *positions, const int32_t *table, int64_t R, int64_t M, int64_t block,
                       const float *cos, const float *sin, int64_t angles, int64_t tokens, int64_t heads,
                       int64_t kv_heads, int64_t width, float scale, int64_t window) {
    Paged c = {pool, half, slots, 2 * kv_heads * width, rows, positions, table, R, M, block, cos, sin, angles, window};
    Heads k = {heads, heads / kv_heads, width, kv_heads * width, width};
    if (!inside(&c, tokens)) return OUTSIDE;
    int threads = threads_for(scores_of(&c, tokens) * heads * 2 * width);
    int64_t kept = kv_heads * width, stride = padded(width);
    float *turned = malloc(4 * tokens * 2 * kept + 1);
    if (!turned) return NO_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; n++) {
        const float *key = qkv + n * qkv_stride + heads * width;
        float *normed = turned + n * 2 * kept, *to = normed + kept;
        for (int64_t g = 0; g < kv_heads; g++, key += width) {
            if (k_norm) rms_norm(normed + g * width, key, k_norm, width, k_eps);
            rotate(to + g * width, k_norm ? normed + g * width : key, cos + positions[n] * (width / 2),
                   sin + positions[n] * (width / 2), width, 0);
        }
        void *entry = slot(&c, n, positions[n]);
        for (int64_t i = 0; i < kept; i++) row_store(entry, i, to[i], half);
        for (int64_t i = 0; i < kept; i++) row_store(entry, kept + i, key[i], half); /* values come after the keys */
    }
    free(turned);
    for (int64_t from = 0, to, spans; from < tokens; from = to) {
        Scratch s;
        to = take(&c, &k, from, tokens, &spans);
        if (!reserve(&s, &k, to - from, spans)) return NO_MEMORY;
        number_spans(&s, &c, from, to);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t n = from; n < to; n++) {
                const float *query = qkv + n * qkv_stride;
                float *q = s.q + (n - from) * heads * stride;
                for (int64_t h = 0; h < heads; h++, query += width, q += stride) {
                    float *normed = s.joined + ((n - from) * heads + h) * stride; /* free until the spans are joined */
                    if (q_norm) rms_norm(normed, query, q_norm, width, q_eps);
                    rotate(q, q_norm ? normed : query, cos + positions[n] * (width / 2),
                           sin + positions[n] * (width / 2), width, 0);
                    for (int64_t i = 0; i < width; i++) q[i] *= scale;
                    for (int64_t i = width; i < stride; i++) q[i] = 0;
                }
            }
            attend(&s, &c, &k, from, to);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < (to - from) * heads; i++)
                memcpy(out + (from * heads + i) * width, s.joined + i * stride, 4 * width);
        }
        free(s.memory);
    }
    return DONE;
}

/* q_C W_UK of one head for some tokens: (count, rank), each row `stride` apart. */
static void absorb(float *out, int64_t stride, const float *q, int64_t q_stride, int64_t count, const char *weight,
                   int64_t nope, int64_t rank, int half) {
    const float one[TILE] = {[0 ... TILE - 1] = 1};
    const void *rows[CHUNK];
    for (int64_t i = 0; i < nope; i += CHUNK) {
        int64_t some = smaller(CHUNK, nope - i);
        for (int64_t j = 0; j < some; j++) rows[j] = weight + (i + j) * rank * (half ? 2 : 4);
        mix(out, stride, i ? one : NULL, q + i, q_stride, count, rows, some, 0, rank, half);
    }
}

/* W_UV o of one head for some tokens: (count, v). */
static void expand(float *out, int64_t out_stride, const float *o, int64_t o_stride, int64_t count, const char *weight,
                   int64_t v, int64_t rank, int half) {
    float some[TILE * CHUNK];
    const void *rows[CHUNK];
    for (int64_t i = 0; i < v; i += CHUNK) {
        int64_t values = smaller(CHUNK, v - i);
        for (int64_t j = 0; j < values; j++) rows[j] = weight + (i + j) * rank * (half ? 2 : 4);
        dots(some, CHUNK, o, o_stride, count, rows, values, 0, rank, half);
        for (int64_t t = 0; t < count; t++) memcpy(out + t * out_stride + i, some + t * CHUNK, 4 * values);
    }
}

/* See mla_attend in attention.py. */
int luciola_mla_attend(float *out, const float *q, int64_t q_stride, const float *ckv, int64_t ckv_stride,
                       const float *norm, float eps, const char *kv_b, int kv_b_half, void *pool, int half,
                       int64_t slots, const int32_t *rows, const int32_t *positions, const int32_t *table, int64_t R,
                       int64_t M, int64_t block, const float *cos, const float *sin, int64_t angles, int64_t tokens,
                       int64_t heads, int64_t rank, int64_t nope, int64_t rope, int64_t v, float scale,
                       int interleaved) {
    int64_t width = rank + rope, stride = padded(width), o_stride = padded(rank);
    int64_t head_bytes = (nope + v) * rank * (kv_b_half ? 2 : 4), values_at = nope * rank * (kv_b_half ? 2 : 4);
    Paged c = {pool, half, slots, width, rows, positions, table, R, M, block, cos, sin, angles, 0};
    Heads k = {heads, heads, width, 0, rank};
    if (!inside(&c, tokens)) return OUTSIDE;
    int threads =
        threads_for(heads * (scores_of(&c, tokens) * (width + rank) + (double)tokens * rank * (nope + v)));
    float *entries = malloc(4 * tokens * width + 1);
    if (!entries) return NO_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < tokens; n++) {
        float *entry = entries + n * width;
        void *to = slot(&c, n, positions[n]);
        rms_norm(entry, ckv + n * ckv_stride, norm, rank, eps);
        rotate(entry + rank, ckv + n * ckv_stride + rank, cos + positions[n] * (rope / 2),
               sin + positions[n] * (rope / 2), rope, interleaved);
        for (int64_t i = 0; i < width; i++) row_store(to, i, entry[i], half);
    }
    free(entries);
    for (int64_t from = 0, to, spans; from < tokens; from = to) {
        Scratch s;
        to = take(&c, &k, from, tokens, &spans);
        if (!reserve(&s, &k, to - from, spans)) return NO_MEMORY;
        number_spans(&s, &c, from, to);
        int64_t tiles = (to - from + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t piece = 0; piece < tiles * heads; piece++) { /* a head's weights serve all tokens in a row */
                int64_t h = piece / tiles, i = piece % tiles * TILE, count = smaller(TILE, to - from - i);
                const float *of = q + (from + i) * q_stride + h * (nope + rope);
                float *made = s.q + (i * heads + h) * stride;
                absorb(made, heads * stride, of, q_stride, count, kv_b + h * head_bytes, nope, rank, kv_b_half);
                for (int64_t t = 0; t < count; t++, made += heads * stride) {
                    int64_t angle = positions[from + i + t] * (rope / 2);
                    rotate(made + rank, of + t * q_stride + nope, cos + angle, sin + angle, rope, interleaved);
                    for (int64_t j = 0; j < width; j++) made[j] *= scale;
                    for (int64_t j = width; j < stride; j++) made[j] = 0;
                }
            }
            attend(&s, &c, &k, from, to);
#pragma omp for schedule(static)
            for (int64_t piece = 0; piece < tiles * heads; piece++) {
                int64_t h = piece / tiles, i = piece % tiles * TILE, count = smaller(TILE, to - from - i);
                expand(out + ((from + i) * heads + h) * v, heads * v, s.joined + (i * heads + h) * o_stride,
                       heads * o_stride, count, kv_b + h * head_bytes + values_at, v, rank, kv_b_half);
            }
        }
        free(s.memory);
    }
    return DONE;
}
