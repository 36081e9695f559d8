/* Calls that were recorded, once more: see repeat.py. */
#include <stdint.h>

typedef struct {
    int (*kernel)(const void *arguments);
    const void *arguments;
} Call;

/* Returns how many were made; fewer than `count` where one failed, whose result is then in `failure`. */
int64_t luciola_repeat(const Call *calls, int64_t count, int *failure)
{
    for (int64_t i = 0; i < count; i++)
        if ((*failure = calls[i].kernel(calls[i].arguments)) != 0)
            return i;
    return count;
}
