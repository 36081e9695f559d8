/* What stands between the products of a layer, forward and backward, each in one pass over memory. See pointwise.py. */
#include <omp.h>
#include <stdlib.h>

#include "rows.h"

enum { DONE, NO_MEMORY };
enum { CHUNKS = 64 };                    /* parts of a sum over rows, whatever the number of threads */
static const int64_t WORTH_THREADS = 1 << 15; /* numbers, some 10 us on one core */

INLINE void some_store(float *to, vec v, int64_t count) {
    if (count >= LANES)
        store(to, v);
    else
        memcpy(to, &v, 4 * count);
}

typedef struct { /* pointwise.py fills it; N rows of D numbers, dense */
    float *y, *r;
    const float *x, *weight, *g; /* g, dx and dweight for gradients only */
    float *dx, *dweight;
    int64_t N, D;
    float eps;
} Norm;

int luciola_rms_norm(const Norm *c) {
    const int64_t D = c->D;
#pragma omp parallel for schedule(static) if (c->N * D > WORTH_THREADS)
    for (int64_t n = 0; n < c->N; n++) {
        const float *x = c->x + n * D;
        vec squares = {0};
        for (int64_t i = 0; i < D; i += LANES) {
            vec v = row_load(x, i, smaller(LANES, D - i), 0);
            squares = madd(v, v, squares);
        }
        const float r = c->r[n] = 1.0f / sqrtf(sum_lanes(squares) / D + c->eps);
        for (int64_t i = 0; i < D; i += LANES) {
            const int64_t count = smaller(LANES, D - i);
            some_store(c->y + n * D + i, row_load(x, i, count, 0) * r * row_load(c->weight, i, count, 0), count);
        }
    }
    return DONE;
}

/* dx = r g w - x r^3 / D * sum(g w x);  dw = sum over rows of r g x */
int luciola_rms_norm_gradients(const Norm *c) {
    const int64_t D = c->D, whole = padded(D), chunks = smaller(CHUNKS, c->N), each = (c->N + chunks - 1) / chunks;
    float *parts = calloc(chunks * whole, 4);
    if (!parts) return NO_MEMORY;
#pragma omp parallel for schedule(static) if (c->N * D > WORTH_THREADS)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        float *dweight = parts + chunk * whole;
        for (int64_t n = chunk * each, end = smaller(n + each, c->N); n < end; n++) {
            const float *x = c->x + n * D, *g = c->g + n * D, r = c->r[n];
            vec along = {0};
            for (int64_t i = 0; i < D; i += LANES) {
                const int64_t count = smaller(LANES, D - i);
                const vec gx = row_load(g, i, count, 0) * row_load(x, i, count, 0);
                along = madd(gx, row_load(c->weight, i, count, 0), along);
                store(dweight + i, madd(gx, all(r), load(dweight + i)));
            }
            const vec back = all(-r * r * r / D * sum_lanes(along));
            for (int64_t i = 0; i < D; i += LANES) {
                const int64_t count = smaller(LANES, D - i);
                const vec gw = row_load(g, i, count, 0) * row_load(c->weight, i, count, 0);
                some_store(c->dx + n * D + i, madd(row_load(x, i, count, 0), back, gw * r), count);
            }
        }
    }
    for (int64_t i = 0; i < D; i++) {
        float sum = 0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) sum += parts[chunk * whole + i];
        c->dweight[i] = sum;
    }
    free(parts);
    return DONE;
}

typedef struct { /* pointwise.py fills it; all of N numbers, dense */
    float *h;
    const float *gate, *up, *dh; /* dh, dgate and dup for gradients only */
    float *dgate, *dup;
    int64_t N;
} Gated;

/* h = gate sigmoid(gate) up */
int luciola_swiglu(const Gated *c) {
#pragma omp parallel for schedule(static) if (c->N > WORTH_THREADS)
    for (int64_t i = 0; i < c->N; i += LANES) {
        const int64_t count = smaller(LANES, c->N - i);
        const vec gate = row_load(c->gate, i, count, 0);
        some_store(c->h + i, gate / (1 + vexp(-gate)) * row_load(c->up, i, count, 0), count);
    }
    return DONE;
}

/* With s = sigmoid(gate): dup = dh gate s;  dgate = dh up s (1 + gate (1 - s)) */
int luciola_swiglu_gradients(const Gated *c) {
#pragma omp parallel for schedule(static) if (c->N > WORTH_THREADS)
    for (int64_t i = 0; i < c->N; i += LANES) {
        const int64_t count = smaller(LANES, c->N - i);
        const vec gate = row_load(c->gate, i, count, 0), dh = row_load(c->dh, i, count, 0);
        const vec s = 1 / (1 + vexp(-gate)), slope = s * madd(gate, 1 - s, all(1));
        some_store(c->dup + i, dh * (gate * s), count);
        some_store(c->dgate + i, dh * row_load(c->up, i, count, 0) * slope, count);
    }
    return DONE;
}

typedef struct { /* pointwise.py fills it; x (B, H, T, d) with any strides but the last, y dense */
    float *y;
    const float *x, *cos, *sin;
    int64_t B, H, T, d, row, head, token, angles; /* angles: from one row's to the next's, 0 where all share them */
    float sign;                                   /* of the sine: -1 turns back */
} Turn;

/* Pairs (i, i + d/2). */
int luciola_turn(const Turn *c) {
    const int64_t half = c->d / 2;
#pragma omp parallel for schedule(static) if (c->B * c->H * c->T * c->d > WORTH_THREADS)
    for (int64_t line = 0; line < c->B * c->H * c->T; line++) {
        const int64_t b = line / (c->H * c->T), h = line / c->T % c->H, t = line % c->T;
        const float *x = c->x + b * c->row + h * c->head + t * c->token;
        const float *cos = c->cos + b * c->angles + t * half, *sin = c->sin + b * c->angles + t * half;
        float *y = c->y + line * c->d;
        for (int64_t i = 0; i < half; i++) {
            const float low = x[i], high = x[i + half], turned = c->sign * sin[i];
            y[i] = low * cos[i] - high * turned;
            y[i + half] = high * cos[i] + low * turned;
        }
    }
    return DONE;
}
