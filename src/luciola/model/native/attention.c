/* Attention of new tokens over a paged cache: grouped-query, and multi-head latent attention with the up-projections
   absorbed. The formulas stand in attention.py.

   A token's positions are cut into spans of SPAN at fixed places; a span is one piece of work, and goes through its
   positions CHUNK at a time with a running maximum. What the spans leave is put together in ascending order. Neither
   depends on the other tokens, on threads or on where blocks lie, so neither does a bit of the result.

   Names: n tokens, H query heads of which R share each of G heads in the cache, M blocks of a table. */
#include <omp.h>
#include <stdlib.h>

#include "rows.h"

enum { CHUNK = ROWS, SPAN = 512 };
enum { DONE, NO_MEMORY, OUTSIDE };
static const double WORTH_THREADS = 4e5;      /* multiplications, about 20 us on one core */
static const int64_t SCRATCH = 16 * 1024 * 1024; /* bytes aimed at: more tokens are taken in turns */

typedef struct { /* what all layers share; attention.py fills it */
    const int32_t *rows, *positions, *table;
    const float *cos, *sin;
    int64_t tokens, R, M, block, angles;
} Step;

typedef struct { /* a layer's pool of slots and what the tokens of the step see of it */
    const Step *step;
    void *pool;
    int half;
    int64_t slots, width;
    int64_t window; /* 0: none */
} Paged;

typedef struct { /* where the heads' keys and values stand in a slot; head g's `*_width` numbers after those of g - 1 */
    int64_t heads, shared; /* shared: query heads to a cached head */
    int64_t key_width, values_at, value_width;
} Heads;

static inline int64_t first_seen(const Paged *c, int64_t n) {
    int64_t from = c->step->positions[n] + 1 - c->window;
    return c->window && from > 0 ? from : 0;
}

static inline int64_t spans_of(const Paged *c, int64_t n) {
    return c->step->positions[n] / SPAN - first_seen(c, n) / SPAN + 1;
}

static inline char *slot(const Paged *c, int64_t n, int64_t position) {
    int64_t block = c->step->table[c->step->rows[n] * c->step->M + position / c->step->block];
    return (char *)c->pool + (block * c->step->block + position % c->step->block) * c->width * (c->half ? 2 : 4);
}

static int inside(const Paged *c) {
    const Step *step = c->step;
    int64_t blocks = c->slots / step->block, last = smaller(step->angles, step->M * step->block);
    for (int64_t n = 0; n < step->tokens; n++) {
        int64_t row = step->rows[n], position = step->positions[n];
        if (row < 0 || row >= step->R || position < 0 || position >= last) return 0;
        for (int64_t m = first_seen(c, n) / step->block; m <= position / step->block; m++)
            if (step->table[row * step->M + m] < 0 || step->table[row * step->M + m] >= blocks) return 0;
    }
    return 1;
}

/* Pairs of a token and a position that it looks at. */
static double looks(const Paged *c) {
    double seen = 0;
    for (int64_t n = 0; n < c->step->tokens; n++) seen += c->step->positions[n] + 1 - first_seen(c, n);
    return seen;
}

static void rotate(float *out, const float *x, const Step *step, int64_t n, int64_t width, int interleaved) {
    int64_t pairs = width / 2, next = interleaved ? 2 : 1, apart = interleaved ? 1 : pairs;
    const float *cos = step->cos + step->positions[n] * pairs, *sin = step->sin + step->positions[n] * pairs;
    for (int64_t i = 0; i < pairs; i++) {
        float a = x[i * next], b = x[i * next + apart];
        out[i * next] = a * cos[i] - b * sin[i];
        out[i * next + apart] = a * sin[i] + b * cos[i];
    }
}

/* One span of one token for `heads` <= GROUP heads that share the cached head g: o_h = sum of e^(s - max) v; max, and
   sum of e^(s - max). */
static void attend_span(const Paged *c, const Heads *k, int64_t n, int64_t g, int64_t heads, int64_t from, int64_t to,
                        const float *q, float *o, float *max, float *sum) {
    int64_t q_stride = padded(k->key_width), o_stride = padded(k->value_width);
    float s[GROUP * CHUNK], keep[GROUP];
    const float *queries[GROUP];
    const void *rows[2 * CHUNK];
    int across = heads % LANES == 0; /* enough of them to stand in the lanes */
    vec lanes[across ? k->key_width * heads / LANES : 1];
    float *q_T = (float *)lanes;
    for (int64_t h = 0; h < heads; h++) queries[h] = q + h * q_stride, max[h] = -INFINITY, sum[h] = 0;
    for (int64_t i = 0; i < k->key_width && across; i++)
        for (int64_t h = 0; h < heads; h++) q_T[i * heads + h] = queries[h][i];
    for (int64_t at = from; at < to;) {
        int64_t end = smaller(to, (at / CHUNK + 1) * CHUNK), count = end - at, first = at == from;
        int64_t coming = across ? smaller(CHUNK, to - end) : 0, known = count + coming;
        Ahead ahead = {rows + count, coming, 0, c->width * (c->half ? 2 : 4)};
        for (int64_t p = 0; p < known;) { /* a block's slots lie one after the other */
            const char *row = slot(c, n, at + p);
            int64_t run = smaller(known, p + c->step->block - (at + p) % c->step->block);
            for (; p < run; p++, row += c->width * (c->half ? 2 : 4)) rows[p] = row;
        }
        if (across)
            dots_transposed(s, CHUNK, q_T, heads, rows, count, g * k->key_width, k->key_width, c->half, &ahead);
        else
            dots(s, CHUNK, queries, heads, rows, count, g * k->key_width, k->key_width, c->half);
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
            k->value_width, c->half, &ahead);
        at = end;
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

/* Inside a parallel region: every span of the tokens from..to, whose queries are prepared (turned, scaled, padded). */
static void attend(const Scratch *s, const Paged *c, const Heads *k, int64_t from, int64_t to) {
    int64_t q_stride = padded(k->key_width), o_stride = padded(k->value_width);
    int64_t groups = (k->shared + GROUP - 1) / GROUP, pieces = k->heads / k->shared * groups;
#pragma omp for schedule(dynamic)
    for (int64_t piece = 0; piece < s->first[to - from] * pieces; piece++) {
        int64_t span = piece / pieces, g = piece % pieces / groups, head = piece % groups * GROUP;
        int64_t heads = smaller(GROUP, k->shared - head), h = g * k->shared + head;
        int64_t i = s->token[span], n = from + i, seen = first_seen(c, n);
        int64_t begin = (seen / SPAN + span - s->first[i]) * SPAN, mark = span * k->heads + h;
        int64_t end = smaller(begin + SPAN, c->step->positions[n] + 1);
        attend_span(c, k, n, g, heads, begin < seen ? seen : begin, end, s->q + (i * k->heads + h) * q_stride,
                    s->o + mark * o_stride, s->max + mark, s->sum + mark);
    }
}

/* The spans of head h of token i as one: sum of e^(max_s - max) o_s / sum of e^(max_s - max) sum_s, padded. */
static float *join_spans(const Scratch *s, const Heads *k, int64_t i, int64_t h) {
    int64_t width = padded(k->value_width), spans = s->first[i + 1] - s->first[i], heads = k->heads;
    int64_t mark = s->first[i] * heads + h;
    const float *o = s->o + mark * width, *max = s->max + mark, *sum = s->sum + mark;
    float *out = s->joined + (i * heads + h) * width, most = max[0], total = 0, w[CHUNK], one = 1;
    const void *rows[CHUNK];
    for (int64_t j = 1; j < spans; j++)
        if (max[j * heads] > most) most = max[j * heads];
    for (int64_t j = 0; j < spans; j++) total += exp1(max[j * heads] - most) * sum[j * heads];
    for (int64_t j = 0; j < spans; j += CHUNK) {
        int64_t count = smaller(CHUNK, spans - j);
        for (int64_t p = 0; p < count; p++) {
            w[p] = exp1(max[(j + p) * heads] - most) / total;
            rows[p] = o + (j + p) * heads * width;
        }
        mix(out, width, j ? &one : NULL, w, CHUNK, 1, rows, count, 0, width, 0, NULL);
    }
    return out;
}

static int threads_for(double multiplications) {
    return multiplications < WORTH_THREADS ? 1 : omp_get_max_threads();
}

/* Normalised where there is a weight, and turned. */
static void turn_head(float *out, const float *x, const float *norm, float eps, const Step *step, int64_t n,
                      int64_t width) {
    float normed[width];
    if (norm) rms_norm(normed, x, norm, width, eps);
    rotate(out, norm ? normed : x, step, n, width, 0);
}

typedef struct { /* attention.py fills it; `q_norm` and `k_norm` may be NULL */
    float *out;
    const float *qkv, *q_norm, *k_norm;
    void *pool;
    const Step *step;
    int64_t qkv_stride, slots, heads, kv_heads, width, window;
    int32_t half;
    float q_eps, k_eps, scale;
} GroupedQuery;

/* See gqa_attend in attention.py. */
int luciola_gqa_attend(const GroupedQuery *a) {
    const Step *step = a->step;
    const float *qkv = a->qkv;
    int64_t heads = a->heads, kv_heads = a->kv_heads, width = a->width, qkv_stride = a->qkv_stride;
    Paged c = {step, a->pool, a->half, a->slots, 2 * kv_heads * width, a->window};
    Heads k = {heads, heads / kv_heads, width, kv_heads * width, width};
    if (!inside(&c)) return OUTSIDE;
    int64_t tokens = step->tokens, stride = padded(width);
    int threads = threads_for(looks(&c) * heads * 2 * width);
    for (int64_t from = 0, to, spans; from < tokens; from = to) {
        Scratch s;
        to = take(&c, &k, from, tokens, &spans);
        if (!reserve(&s, &k, to - from, spans)) return NO_MEMORY;
        number_spans(&s, &c, from, to);
#pragma omp parallel num_threads(threads)
        {
            if (from == 0) /* every entry, before any token attends */
#pragma omp for schedule(static) nowait
                for (int64_t n = 0; n < tokens; n++) {
                    const float *key = qkv + n * qkv_stride + heads * width, *value = key + kv_heads * width;
                    void *entry = slot(&c, n, step->positions[n]);
                    float turned[width];
                    for (int64_t g = 0; g < kv_heads; g++) {
                        turn_head(turned, key + g * width, a->k_norm, a->k_eps, step, n, width);
                        for (int64_t i = 0; i < width; i++) row_store(entry, g * width + i, turned[i], a->half);
                    }
                    for (int64_t i = 0; i < kv_heads * width; i++)
                        row_store(entry, kv_heads * width + i, value[i], a->half);
                }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < (to - from) * heads; i++) {
                int64_t n = from + i / heads;
                float *q = s.q + i * stride;
                turn_head(q, qkv + n * qkv_stride + i % heads * width, a->q_norm, a->q_eps, step, n, width);
                for (int64_t j = 0; j < width; j++) q[j] *= a->scale;
                for (int64_t j = width; j < stride; j++) q[j] = 0;
            }
            attend(&s, &c, &k, from, to);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < (to - from) * heads; i++)
                memcpy(a->out + (from * heads + i) * width, join_spans(&s, &k, i / heads, i % heads), 4 * width);
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
        mix(out, stride, i ? one : NULL, q + i, q_stride, count, rows, some, 0, rank, half, NULL);
    }
}

/* W_UV o of one head for some tokens: (count, v). */
static void expand(float *out, int64_t out_stride, const float *o, int64_t o_stride, int64_t count, const char *weight,
                   int64_t v, int64_t rank, int half) {
    float some[TILE * CHUNK];
    const float *tokens[TILE];
    const void *rows[CHUNK];
    for (int64_t t = 0; t < count; t++) tokens[t] = o + t * o_stride;
    for (int64_t i = 0; i < v; i += CHUNK) {
        int64_t values = smaller(CHUNK, v - i);
        for (int64_t j = 0; j < values; j++) rows[j] = weight + (i + j) * rank * (half ? 2 : 4);
        dots(some, CHUNK, tokens, count, rows, values, 0, rank, half);
        for (int64_t t = 0; t < count; t++) memcpy(out + t * out_stride + i, some + t * CHUNK, 4 * values);
    }
}

typedef struct { /* attention.py fills it */
    float *out;
    const float *q, *ckv, *norm;
    const char *kv_b;
    void *pool;
    const Step *step;
    int64_t q_stride, ckv_stride, slots, heads, rank, nope, rope, v;
    int32_t kv_b_half, half, interleaved;
    float eps, scale;
} Latent;

/* See mla_attend in attention.py. */
int luciola_mla_attend(const Latent *a) {
    const Step *step = a->step;
    const float *q = a->q, *ckv = a->ckv;
    const char *kv_b = a->kv_b;
    int64_t q_stride = a->q_stride, ckv_stride = a->ckv_stride, heads = a->heads, rank = a->rank, nope = a->nope;
    int64_t rope = a->rope, v = a->v;
    int kv_b_half = a->kv_b_half, half = a->half;
    int64_t tokens = step->tokens, width = rank + rope, stride = padded(width), o_stride = padded(rank);
    int64_t head_bytes = (nope + v) * rank * (kv_b_half ? 2 : 4), values_at = nope * rank * (kv_b_half ? 2 : 4);
    Paged c = {step, a->pool, half, a->slots, width, 0};
    Heads k = {heads, heads, width, 0, rank};
    if (!inside(&c)) return OUTSIDE;
    int threads =
        threads_for(heads * (looks(&c) * (width + rank) + (double)tokens * rank * (nope + v)));
    for (int64_t from = 0, to, spans; from < tokens; from = to) {
        Scratch s;
        to = take(&c, &k, from, tokens, &spans);
        if (!reserve(&s, &k, to - from, spans)) return NO_MEMORY;
        number_spans(&s, &c, from, to);
        int64_t tiles = (to - from + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
        {
            if (from == 0) /* every entry, before any token attends */
#pragma omp for schedule(static) nowait
                for (int64_t n = 0; n < tokens; n++) {
                    float entry[width];
                    void *to = slot(&c, n, step->positions[n]);
                    rms_norm(entry, ckv + n * ckv_stride, a->norm, rank, a->eps);
                    rotate(entry + rank, ckv + n * ckv_stride + rank, step, n, rope, a->interleaved);
                    for (int64_t i = 0; i < width; i++) row_store(to, i, entry[i], half);
                }
#pragma omp for schedule(static)
            for (int64_t piece = 0; piece < tiles * heads; piece++) { /* a head's weights serve all tokens in a row */
                int64_t h = piece / tiles, i = piece % tiles * TILE, count = smaller(TILE, to - from - i);
                const float *of = q + (from + i) * q_stride + h * (nope + rope);
                float *made = s.q + (i * heads + h) * stride;
                absorb(made, heads * stride, of, q_stride, count, kv_b + h * head_bytes, nope, rank, kv_b_half);
                for (int64_t t = 0; t < count; t++, made += heads * stride) {
                    rotate(made + rank, of + t * q_stride + nope, step, from + i + t, rope, a->interleaved);
                    for (int64_t j = 0; j < width; j++) made[j] *= a->scale;
                    for (int64_t j = width; j < stride; j++) made[j] = 0;
                }
            }
            attend(&s, &c, &k, from, to);
#pragma omp for schedule(static)
            for (int64_t piece = 0; piece < tiles * heads; piece++) {
                int64_t h = piece / tiles, i = piece % tiles * TILE, count = smaller(TILE, to - from - i);
                for (int64_t t = 0; t < count; t++) join_spans(&s, &k, i + t, h);
                expand(a->out + ((from + i) * heads + h) * v, heads * v, s.joined + (i * heads + h) * o_stride,
                       heads * o_stride, count, kv_b + h * head_bytes + values_at, v, rank, kv_b_half);
            }
        }
        free(s.memory);
    }
    return DONE;
}
