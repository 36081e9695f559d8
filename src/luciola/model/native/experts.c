/* DeepSeekMoE for few tokens: y = x + shared(norm x) + sum over k of w_k expert_k(norm x). The formula: `MoE.forward`.

   Assignments are sorted by expert, so that each expert's weights are read once however many tokens chose it. First all
   inner products h = silu(gate x) * (up x), LANES of an expert at a time; then columns of y, LANES at a time: the
   thread that owns them adds up the shared experts and the chosen ones in the token's own order. So no bit of a token's
   result depends on the other tokens or on threads.

   Names: n tokens, E experts, K chosen a token, m assignments in expert order, D hidden, I inner width. */
#include <omp.h>
#include <stdlib.h>

#include "rows.h"

enum { DONE, NO_MEMORY };
static const double WORTH_THREADS = 2e5; /* multiplications, about 10 us on one core */

typedef struct { /* one SwiGLU: gate and up are (I, D), down is (D, I) */
    const char *gate, *up, *down;
    int64_t inner;
    int half;
} Expert;

typedef struct { /* which tokens an expert serves: rows of `in` and of `h`, one below the other */
    Expert expert;
    const float *const *x; /* normalised tokens */
    float *h;              /* padded(inner) apart */
    int64_t count;
} Work;

typedef struct {
    int64_t experts, chosen, groups, kept_groups;
    int sigmoid, biased, normalised;
    float scaling;
} Rule;

/* Torch counts NaN as the greatest number. Equal ones: the lower index first. */
INLINE int better(float a, float b) { return a > b || (a != a && b == b); }

static void best(const float *x, int64_t count, int64_t wanted, int64_t *indices) {
    for (int64_t k = 0; k < wanted; k++) {
        int64_t at = -1;
        for (int64_t i = 0; i < count; i++) {
            int taken = 0;
            for (int64_t j = 0; j < k; j++) taken |= indices[j] == i;
            if (!taken && (at < 0 || better(x[i], x[at]))) at = i;
        }
        indices[k] = at;
    }
}

/* Gate.choose: the experts of one token from their affinities. */
static void choose(const Rule *r, const float *scores, const float *bias, int64_t *indices) {
    int64_t E = r->experts, G = r->groups, width = E / G;
    float choice[E];
    for (int64_t e = 0; e < E; e++) choice[e] = bias ? scores[e] + bias[e] : scores[e];
    if (G > 1) {
        float worth[G];
        int64_t kept[r->kept_groups], two[2];
        for (int64_t g = 0; g < G; g++) {
            const float *of = choice + g * width;
            int64_t counted = r->biased ? smaller(2, width) : 1;
            best(of, width, counted, two);
            worth[g] = counted == 2 ? of[two[0]] + of[two[1]] : of[two[0]];
        }
        best(worth, G, r->kept_groups, kept);
        for (int64_t g = 0; g < G; g++) {
            int keep = 0;
            for (int64_t j = 0; j < r->kept_groups; j++) keep |= kept[j] == g;
            for (int64_t e = g * width; e < (g + 1) * width && !keep; e++) choice[e] = -INFINITY;
        }
    }
    best(choice, E, r->chosen, indices);
}

/* Gate.weigh: the weights of the chosen experts. */
static void weigh(const Rule *r, const float *scores, const int64_t *indices, float *weights) {
    float sum = 0, factor = r->scaling;
    for (int64_t k = 0; k < r->chosen; k++) sum += weights[k] = scores[indices[k]];
    if (r->normalised) {
        for (int64_t k = 0; k < r->chosen; k++) weights[k] /= sum + 1e-20f;
        if (!r->sigmoid) factor = 1; /* V2's code either normalises or scales */
    }
    for (int64_t k = 0; k < r->chosen; k++) weights[k] *= factor;
}

/* Gate.scores: affinities of one token; room for padded(E). */
static void affinities(const Rule *r, const float *x, const char *gate, int half, int64_t D, float *scores) {
    int64_t E = r->experts;
    for (int64_t e = 0; e < E; e += LANES) {
        const void *rows[LANES];
        int64_t count = smaller(LANES, E - e);
        for (int64_t j = 0; j < count; j++) rows[j] = gate + (e + j) * D * (half ? 2 : 4);
        dots(scores + e, LANES, &x, 1, rows, count, 0, D, half);
    }
    if (r->sigmoid) {
        for (int64_t e = 0; e < E; e += LANES) store(scores + e, 1.0f / (1.0f + vexp(-load(scores + e))));
        return;
    }
    for (int64_t e = E; e < padded(E); e++) scores[e] = -INFINITY;
    vec most = load(scores), total = {0};
    for (int64_t e = LANES; e < E; e += LANES) most = greater(load(scores + e), most);
    float top = max_lanes(most);
    for (int64_t e = 0; e < E; e += LANES) {
        vec v = vexp(load(scores + e) - top);
        store(scores + e, v);
        total += v;
    }
    float sum = sum_lanes(total);
    for (int64_t e = 0; e < E; e += LANES) store(scores + e, load(scores + e) / sum);
}

/* h = silu(gate x) * (up x) for LANES inner numbers from i on, for all tokens of an expert. */
static void inner_block(const Work *w, int64_t i, int64_t D) {
    float gate[GROUP * LANES], up[GROUP * LANES];
    const void *gates[LANES], *ups[LANES];
    int64_t count = smaller(LANES, w->expert.inner - i), bytes = D * (w->expert.half ? 2 : 4);
    for (int64_t j = 0; j < count; j++) {
        gates[j] = w->expert.gate + (i + j) * bytes;
        ups[j] = w->expert.up + (i + j) * bytes;
    }
    for (int64_t m = 0; m < w->count; m += GROUP) {
        int64_t some = smaller(GROUP, w->count - m);
        dots(gate, LANES, w->x + m, some, gates, count, 0, D, w->expert.half);
        dots(up, LANES, w->x + m, some, ups, count, 0, D, w->expert.half);
        for (int64_t j = 0; j < some; j++) {
            vec g = load(gate + j * LANES), u = load(up + j * LANES);
            store(w->h + (m + j) * padded(w->expert.inner) + i, g / (1.0f + vexp(-g)) * u);
        }
    }
}

/* down h for LANES columns of D from d on: (count, LANES). */
static void down_block(const Work *w, int64_t d, int64_t D, float *out) {
    const void *rows[LANES];
    const float *h[GROUP];
    int64_t count = smaller(LANES, D - d), bytes = w->expert.inner * (w->expert.half ? 2 : 4);
    for (int64_t j = 0; j < count; j++) rows[j] = w->expert.down + (d + j) * bytes;
    for (int64_t m = 0; m < w->count; m += GROUP) {
        int64_t some = smaller(GROUP, w->count - m);
        for (int64_t j = 0; j < some; j++) h[j] = w->h + (m + j) * padded(w->expert.inner);
        dots(out + m * LANES, LANES, h, some, rows, count, 0, w->expert.inner, w->expert.half);
    }
}

static char *cut(char **from, int64_t bytes) {
    char *piece = *from;
    *from += (bytes + 63) / 64 * 64;
    return piece;
}

typedef struct { /* experts.py fills it; `bias` may be NULL, without shared experts `shared_inner` is 0 */
    float *y;
    int64_t *indices;
    float *scores;
    const float *x, *norm;
    const char *gate;
    const float *bias;
    const char *gate_up, *down, *shared_gate, *shared_up, *shared_down;
    int64_t shared_inner;
    int32_t shared_half;
    int64_t x_stride, N, D, inner, E, K, groups, kept_groups;
    int32_t gate_half, half, sigmoid, biased, normalised;
    float eps, scaling;
} Call;

/* See moe in experts.py. */
int luciola_moe(const Call *call) {
    const Call c = *call;
    Rule rule = {c.E, c.K, c.groups, c.kept_groups, c.sigmoid, c.biased, c.normalised, c.scaling};
    const float *x = c.x;
    float *y = c.y, *scores = c.scores;
    int64_t *indices = c.indices, x_stride = c.x_stride, N = c.N, D = c.D, E = c.E, K = c.K;
    int64_t inner = c.inner, shared_inner = c.shared_inner;
    int64_t M = N * K, wide = padded(D), number = c.half ? 2 : 4, works = 0, pieces = 0;
    double work = (double)D * (3 * M * inner + 3 * N * shared_inner + N * E);
    int threads = work < WORTH_THREADS ? 1 : omp_get_max_threads();
    int64_t sizes[] = {4 * N * wide, 4 * N * padded(E), 4 * M, 8 * M, 8 * (M + N), 4 * M * padded(inner),
                       4 * N * padded(shared_inner), (E + 1) * (int64_t)sizeof(Work), 8 * (E + 2),
                       4 * threads * (M + N) * LANES};
    int64_t bytes = 64;
    for (int i = 0; i < 10; i++) bytes += (sizes[i] + 63) / 64 * 64;
    char *memory = malloc(bytes), *rest = (char *)(((uintptr_t)memory + 63) / 64 * 64);
    if (!memory) return NO_MEMORY;
    float *normed = (float *)cut(&rest, sizes[0]), *affinity = (float *)cut(&rest, sizes[1]);
    float *weights = (float *)cut(&rest, sizes[2]);
    int64_t *place = (int64_t *)cut(&rest, sizes[3]); /* of each token's choices in expert order */
    const float **tokens = (const float **)cut(&rest, sizes[4]);
    float *h = (float *)cut(&rest, sizes[5]), *shared_h = (float *)cut(&rest, sizes[6]);
    Work *of = (Work *)cut(&rest, sizes[7]);
    int64_t *start = (int64_t *)cut(&rest, sizes[8]);
    float *products = (float *)cut(&rest, sizes[9]);

#pragma omp parallel for num_threads((double)N * E * D < WORTH_THREADS ? 1 : threads) schedule(static)
    for (int64_t n = 0; n < N; n++) {
        rms_norm(normed + n * wide, x + n * x_stride, c.norm, D, c.eps);
        for (int64_t i = D; i < wide; i++) normed[n * wide + i] = 0;
        affinities(&rule, normed + n * wide, c.gate, c.gate_half, D, affinity + n * padded(E));
        memcpy(scores + n * E, affinity + n * padded(E), 4 * E);
        choose(&rule, scores + n * E, c.bias, indices + n * K);
        weigh(&rule, scores + n * E, indices + n * K, weights + n * K);
    }

    memset(start, 0, 8 * (E + 2));
    for (int64_t m = 0; m < M; m++) start[indices[m] + 2]++;
    for (int64_t e = 2; e < E + 2; e++) start[e] += start[e - 1]; /* now start[e + 1] is where expert e begins */
    for (int64_t m = 0; m < M; m++) {
        place[m] = start[indices[m] + 1]++; /* and in the end where it ends */
        tokens[place[m]] = normed + m / K * wide;
    }
    for (int64_t e = 0; e < E; e++) {
        const char *both = c.gate_up + e * 2 * inner * D * number;
        Expert expert = {both, both + inner * D * number, c.down + e * D * inner * number, inner, c.half};
        int64_t begin = start[e], count = start[e + 1] - begin;
        if (count) of[works++] = (Work){expert, tokens + begin, h + begin * padded(inner), count};
    }
    pieces = works * (padded(inner) / LANES);
    if (shared_inner) {
        for (int64_t n = 0; n < N; n++) tokens[M + n] = normed + n * wide;
        Expert expert = {c.shared_gate, c.shared_up, c.shared_down, shared_inner, c.shared_half};
        of[works] = (Work){expert, tokens + M, shared_h, N};
    }

#pragma omp parallel num_threads(threads)
    {
        int64_t blocks = padded(inner) / LANES;
        float *made = products + omp_get_thread_num() * (M + N) * LANES, *shared = made + M * LANES;
#pragma omp for schedule(static, 1)
        for (int64_t i = 0; i < pieces + padded(shared_inner) / LANES; i++)
            if (i < pieces)
                inner_block(of + i / blocks, i % blocks * LANES, D);
            else
                inner_block(of + works, (i - pieces) * LANES, D);
#pragma omp for schedule(static, 1)
        for (int64_t block = 0; block < wide / LANES; block++) {
            int64_t d = block * LANES, count = smaller(LANES, D - d);
            for (int64_t e = 0; e < works; e++) down_block(of + e, d, D, made + (of[e].h - h) / padded(inner) * LANES);
            if (shared_inner) down_block(of + works, d, D, shared);
            for (int64_t n = 0; n < N; n++) {
                vec sum = row_load(x + n * x_stride, d, count, 0);
                if (shared_inner) sum += load(shared + n * LANES);
                for (int64_t k = 0; k < K; k++)
                    sum = madd(all(weights[n * K + k]), load(made + place[n * K + k] * LANES), sum);
                memcpy(y + n * D + d, &sum, 4 * count);
            }
        }
    }
    free(memory);
    return DONE;
}
