/* Vectors of floats as wide as this CPU's, by the vector extension of gcc and clang; images are bf16 or floats. */
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define REGISTERS 32
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#define REGISTERS 16
#else /* SSE2, NEON */
#define LANES 4
#define REGISTERS 16
#endif
#ifdef __AVX512BF16__
#define BF16_PRODUCTS 1
#else
#define BF16_PRODUCTS 0
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

INLINE floats widened(halves bits) { return (floats)(__builtin_convertvector(bits, integers) << 16); }

INLINE floats load(const void *base, int64_t index, int bf16)
{
    floats numbers;
    halves bits;
    if (bf16) {
        memcpy(&bits, (const uint16_t *)base + index, sizeof bits);
        return widened(bits);
    }
    memcpy(&numbers, (const float *)base + index, sizeof numbers);
    return numbers;
}

INLINE halves rounded(floats numbers) /* to even; NaN stays NaN, for its lowest bits are not carried */
{
#if BF16_PRODUCTS
    return (halves)_mm512_cvtneps_pbh((__m512)numbers);
#else
    integers bits = (integers)numbers, odd = (bits >> 16) & 1, is_nan = numbers != numbers;
    integers upper = ((bits + ((0x7fff + odd) & ~is_nan)) >> 16) & 0xffff;
    return __builtin_convertvector(upper | (is_nan & 0x40), halves);
#endif
}

INLINE void store(void *base, int64_t index, floats numbers, int bf16)
{
    if (bf16) {
        halves bits = rounded(numbers);
        memcpy((uint16_t *)base + index, &bits, sizeof bits);
    } else
        memcpy((float *)base + index, &numbers, sizeof numbers);
}

INLINE float load_one(const void *base, int64_t index, int bf16)
{
    if (!bf16) return ((const float *)base)[index];
    uint32_t bits = (uint32_t)((const uint16_t *)base)[index] << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* Every second number from `index` on: those of a shortcut that repeats channels twice. */
INLINE floats load_second(const void *base, int64_t index, int bf16)
{
    floats numbers;
    for (int lane = 0; lane < LANES; lane++) numbers[lane] = load_one(base, index + 2 * lane, bf16);
    return numbers;
}

INLINE floats within(floats x, float low, float high)
{
    floats lows = (floats){0} + low, highs = (floats){0} + high;
#if defined(__AVX512F__)
    return (floats)_mm512_min_ps(_mm512_max_ps((__m512)x, (__m512)lows), (__m512)highs);
#elif defined(__AVX2__)
    return (floats)_mm256_min_ps(_mm256_max_ps((__m256)x, (__m256)lows), (__m256)highs);
#else
    integers below = x < lows, beyond = x > highs;
    return (floats)(((integers)x & ~below & ~beyond) | ((integers)lows & below) | ((integers)highs & beyond));
#endif
}

INLINE floats inverse_of(floats x) /* of numbers from 1 to 2**127, to the last bits of a float */
{
#if defined(__AVX512F__)
    floats first = (floats)_mm512_rcp14_ps((__m512)x);
    return first * (2 - x * first);
#else
    return 1 / x;
#endif
}

INLINE floats power_of_two(floats x) /* of its fraction by a polynomial; x is limited to 2**-126 and 2**126 */
{
    const float rounding = 1.5f * (1 << 23);
    floats power = within(x, -126, 126), shifted = power + rounding, f = power - (shifted - rounding);
    floats e = 1 + f * (0.693147181f + f * (0.240226507f + f * (0.0555041087f + f * (0.00961812911f
               + f * (0.00133335581f + f * 0.000154035304f)))));
    integers exponent = ((integers)shifted - 0x4b400000) << 23;
    return (floats)((integers)e + exponent);
}

#define LOG2_E 1.44269504f

INLINE floats silu(floats x) { return x * inverse_of(1 + power_of_two(x * -LOG2_E)); } /* x / (1 + exp(-x)) */

INLINE floats larger_of(floats a, floats b)
{
    integers keep = a > b;
    return (floats)(((integers)a & keep) | ((integers)b & ~keep));
}

INLINE float sum_of(floats x)
{
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}
