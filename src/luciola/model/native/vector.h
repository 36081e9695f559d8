/* Vectors of the processor's width, and sixteen lanes made of them.

Sums are kept in sixteen lanes everywhere: one vector with AVX-512, two with AVX, four with NEON or SSE. Written with
the vector types of GCC and Clang, which any processor has; where an instruction exists that the compilers do not find
by themselves, it stands beside the portable form. Files that include this fix the order of every sum, so the compiler's
freedom to reorder (see build.py) ends here: results would depend on which loop a value went through. */
#pragma once

#if defined(__clang__)
#pragma clang fp reassociate(off)
#else
#pragma GCC optimize("no-associative-math")
#endif

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define AVX512 1
#define WIDTH 16
#elif defined(__AVX2__) && defined(__F16C__)
#define AVX2 1
#define WIDTH 8
#else
#define WIDTH 4
#endif
#if defined(AVX512) || defined(AVX2)
#include <immintrin.h>
#endif

#define LANES 16
#define PARTS (LANES / WIDTH)
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t hvec __attribute__((vector_size(2 * WIDTH)));
typedef int8_t bvec __attribute__((vector_size(WIDTH)));
typedef uint8_t uvec __attribute__((vector_size(WIDTH)));

INLINE vec load(const void *from)
{
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store(float *to, vec v) { memcpy(to, &v, sizeof v); }

/* Makes the compiler hold the value in a register. */
INLINE void keep(vec *v)
{
#ifdef AVX512
    __asm__("" : "+v"(*v));
#else
    (void)v;
#endif
}

INLINE float bf16_to_float(uint16_t upper)
{
    const uint32_t bits = (uint32_t)upper << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE vec load_bf16(const uint16_t *from)
{
#if defined(AVX512)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16);
#elif defined(AVX2)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)from)), 16);
#else
    hvec v;
    memcpy(&v, from, sizeof v);
    return (vec)(__builtin_convertvector(v, ivec) << 16);
#endif
}

INLINE vec load_int8(const int8_t *from)
{
#if defined(AVX512)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from)));
#elif defined(AVX2)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)from)));
#else
    bvec v;
    memcpy(&v, from, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, ivec), vec);
#endif
}

/* scale * q + minimum for the low or high halves q of WIDTH bytes. */
INLINE vec load_int4(const uint8_t *from, int high, float scale, float minimum)
{
#if defined(AVX512)
    /* The sixteen values a half can mean, looked up sixteen times in one instruction, which ignores higher bits. */
    const vec count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)from));
    return (vec)_mm512_permutexvar_ps(high ? _mm512_srli_epi32(wide, 4) : wide, (__m512)(count * scale + minimum));
#else
#if defined(AVX2)
    const ivec wide = (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)from));
#else
    uvec v;
    memcpy(&v, from, sizeof v);
    const ivec wide = __builtin_convertvector(v, ivec);
#endif
    return __builtin_convertvector(high ? wide >> 4 : wide & 15, vec) * scale + minimum;
#endif
}

INLINE float half_to_float(uint16_t half)
{
#ifdef __FLT16_MANT_DIG__
    _Float16 h;
    memcpy(&h, &half, sizeof h);
    return (float)h;
#else
    /* Exponent and fraction moved to their places and scaled by 2^112, which also makes subnormals right. */
    const uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    float x;
    memcpy(&x, &bits, sizeof x);
    x = (half & 0x7c00) == 0x7c00 ? x + INFINITY : x * 0x1p112f;
    return half & 0x8000 ? -x : x;
#endif
}

/* n float16 numbers as float32. */
INLINE void halves(float *to, const uint16_t *from, ptrdiff_t n)
{
#if defined(AVX512)
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        const __mmask16 mask = n - i >= LANES ? 0xffff : (1u << (n - i)) - 1;
        _mm512_mask_storeu_ps(to + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from + i)));
    }
#else
    ptrdiff_t i = 0;
#if defined(AVX2)
    for (; i + WIDTH <= n; i += WIDTH)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(from + i))));
#endif
    for (; i < n; i++)
        to[i] = half_to_float(from[i]);
#endif
}

/* The sum of sixteen lanes: lane l with l + 8, then l + 4, l + 2, l + 1. */
INLINE float sum(const float lanes[LANES])
{
    float a[8], b[4];
    for (int l = 0; l < 8; l++)
        a[l] = lanes[l] + lanes[l + 8];
    for (int l = 0; l < 4; l++)
        b[l] = a[l] + a[l + 4];
    return (b[0] + b[2]) + (b[1] + b[3]);
}

/* The sums of eight times sixteen lanes, each down that same tree. */
INLINE void sums_of_8(float to[8], const float from[8][LANES])
{
#ifdef AVX512
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
    vec half[4], quarter[2];
    for (int i = 0; i < 4; i++) {
        const vec a = load(from[i]), b = load(from[i + 4]);
        half[i] = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < 2; i++) /* numbers i, i + 2, i + 4, i + 6, four lanes each */
        quarter[i] = SHUFFLE(half[i], half[i + 2], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                     SHUFFLE(half[i], half[i + 2], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    const vec a = quarter[0], b = quarter[1]; /* numbers 0, 1, 2, ... in turn, two lanes each */
    const vec pairs = SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                      SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    const vec all = SHUFFLE(pairs, pairs, 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14) +
                    SHUFFLE(pairs, pairs, 1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15);
    memcpy(to, &all, 8 * sizeof *to);
#else
    for (int i = 0; i < 8; i++)
        to[i] = sum(from[i]);
#endif
}

/* x / (1 + e^-x). The exponential is 2^n times a polynomial in the rest (Cephes' expf, two units in the last place);
written for one number, so that compilers make vectors of it. NaN stays NaN. */
INLINE float silu(float x)
{
    float t = -x;
    t = t > 88.0f ? 88.0f : t;
    t = t < -87.0f ? -87.0f : t;
    const float scaled = t * 1.44269504f;
    const int32_t n = (int32_t)(scaled + (scaled < 0 ? -0.5f : 0.5f));
    const float r = (t - (float)n * 0.693359375f) + (float)n * 2.12194440e-4f;
    float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const int32_t bits = (n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x / (1.0f + p * power);
}
