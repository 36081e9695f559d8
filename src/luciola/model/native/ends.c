/* The two ends of a step: rows of the embedding come in, and states go out normalised. See ends.py. */
#include "rows.h"

typedef struct {
    float *y; /* (N, D) */
    const int64_t *tokens;
    const void *table; /* (V, D) */
    int64_t N, V, D;
    int32_t half;
} Embed;

/* Returns 1 where a token is none of the table's. */
int luciola_embed(const Embed *call)
{
    const int64_t D = call->D;
    for (int64_t n = 0; n < call->N; n++) {
        const int64_t token = call->tokens[n];
        if (token < 0 || token >= call->V)
            return 1;
        const char *row = (const char *)call->table + token * D * (call->half ? 2 : 4);
        float *y = call->y + n * D;
        for (int64_t i = 0; i < D; i += LANES) {
            const int64_t count = smaller(LANES, D - i);
            const vec v = row_load(row, i, count, call->half);
            memcpy(y + i, &v, 4 * count);
        }
    }
    return 0;
}

typedef struct {
    float *y; /* (N, D) */
    const float *x;
    const void *weight;
    int64_t N, D;
    int32_t half;
    float eps;
} Norm;

int luciola_norm(const Norm *call)
{
    const int64_t D = call->D;
    for (int64_t n = 0; n < call->N; n++) {
        const float *x = call->x + n * D;
        float *y = call->y + n * D;
        vec squares = {0};
        for (int64_t i = 0; i < D; i += LANES) {
            const vec v = row_load(x, i, smaller(LANES, D - i), 0);
            squares = madd(v, v, squares);
        }
        const vec r = all(1.0f / sqrtf(sum_lanes(squares) / D + call->eps));
        for (int64_t i = 0; i < D; i += LANES) {
            const int64_t count = smaller(LANES, D - i);
            const vec v = row_load(x, i, count, 0) * r * row_load(call->weight, i, count, call->half);
            memcpy(y + i, &v, 4 * count);
        }
    }
    return 0;
}
