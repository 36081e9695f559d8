/* Sixteen float32 lanes, and the few functions on them that PyTorch's kernels would give with other roundings.

Written with the vector types of GCC and Clang, which any processor has; where AVX-512 has an instruction that the
compiler does not find by itself, it stands beside the portable form. Files that include this fix the order of every
sum, so the compiler's freedom to reorder (see build.py) ends here: results would depend on which loop a value went
through. */
#pragma once

#if defined(__clang__)
#pragma clang fp reassociate(off)
#else
#pragma GCC optimize("no-associative-math")
#endif

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define AVX512 1
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

#define UNROLL _Pragma("GCC unroll 8")

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i32x16){__VA_ARGS__})
#endif

/* Makes the compiler hold the value in a register. */
INLINE void keep(f32x16 *v)
{
#ifdef AVX512
    __asm__("" : "+v"(*v));
#endif
}

INLINE f32x16 load(const void *from)
{
    f32x16 v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store(float *to, f32x16 v) { memcpy(to, &v, sizeof v); }

INLINE f32x16 all(float x) { return (f32x16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

/* The first n < 16 floats; the other lanes are 0. */
INLINE f32x16 load_some(const float *from, ptrdiff_t n)
{
    f32x16 v = {0};
    memcpy(&v, from, n * sizeof(float));
    return v;
}

/* A bfloat16 is the upper half of a float32. */
INLINE f32x16 load_bf16(const uint16_t *from)
{
    u16x16 half;
    memcpy(&half, from, sizeof half);
#ifdef AVX512
    return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
#else
    return (f32x16)(__builtin_convertvector(half, i32x16) << 16);
#endif
}

INLINE f32x16 load_some_bf16(const uint16_t *from, ptrdiff_t n)
{
    uint16_t padded[LANES] = {0};
    memcpy(padded, from, n * sizeof *padded);
    return load_bf16(padded);
}

INLINE f32x16 load_int8(const int8_t *from)
{
    i8x16 v;
    memcpy(&v, from, sizeof v);
#ifdef AVX512
    return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)v));
#else
    return __builtin_convertvector(__builtin_convertvector(v, i32x16), f32x16);
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
    const uint32_t bits = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    x = (half & 0x7c00) == 0x7c00 ? x + __builtin_inff() : x * 0x1p112f;
    return sign ? -x : x;
#endif
}

/* n float16 numbers as float32. */
INLINE void halves(float *to, const uint16_t *from, ptrdiff_t n)
{
#ifdef AVX512
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        const __mmask16 mask = n - i >= LANES ? 0xffff : (1u << (n - i)) - 1;
        _mm512_mask_storeu_ps(to + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from + i)));
    }
#else
    for (ptrdiff_t i = 0; i < n; i++)
        to[i] = half_to_float(from[i]);
#endif
}

/* Adding up lanes always goes down the same tree: lane l with l + 8, then l + 4, l + 2, l + 1. */
INLINE float sum(f32x16 v)
{
    v += SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    return (v[0] + v[2]) + (v[1] + v[3]);
}

/* The sums of eight vectors, in lanes 0 to 7, by that same tree. */
INLINE f32x16 sums_of_8(const f32x16 v[8])
{
    f32x16 half[4], quarter[2];
    for (int i = 0; i < 4; i++)
        half[i] = SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  SHUFFLE(v[i], v[i + 4], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++) /* vectors i, i + 2, i + 4, i + 6, four lanes each */
        quarter[i] = SHUFFLE(half[i], half[i + 2], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                     SHUFFLE(half[i], half[i + 2], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    const f32x16 a = quarter[0], b = quarter[1]; /* vectors 0, 1, 2, ... in turn, two lanes each */
    const f32x16 pairs = SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                         SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLE(pairs, pairs, 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14) +
           SHUFFLE(pairs, pairs, 1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15);
}

INLINE f32x16 choose(i32x16 where, f32x16 yes, f32x16 no)
{
    return (f32x16)(((i32x16)yes & where) | ((i32x16)no & ~where));
}

/* e^x within two units in the last place: 2^n times a polynomial in the rest (Cephes' expf). NaN stays NaN. */
INLINE f32x16 exp16(f32x16 x)
{
    x = choose(x > 88.0f, all(88.0f), x);
    x = choose(x < -87.0f, all(-87.0f), x);
    const f32x16 scaled = x * 1.44269504f;
    const i32x16 n = __builtin_convertvector(scaled + choose(scaled < 0, all(-0.5f), all(0.5f)), i32x16);
    const f32x16 whole = __builtin_convertvector(n, f32x16);
    const f32x16 r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (f32x16)((n + 127) << 23);
}

INLINE f32x16 silu(f32x16 x) { return x / (exp16(-x) + 1.0f); }
