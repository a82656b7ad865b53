/* y [rows][out] = x [rows][in] times w [out][in] transposed, all bf16, for a few rows: weights are read from memory
 * once, at its full rate, because those of the next outputs are prefetched while this thread computes. A row of y does
 * not depend on the others. engines/backends/cpu/kernels/few_rows.py has the caller.
 */
#include "vectors.h"

#if BF16_PRODUCTS
#include "blocks.h"

#define OUTPUTS 4 /* computed together; divides out */
#define ROWS 5    /* computed together */
#define BLOCK 64  /* outputs of a block */

struct product {
    const uint16_t *x, *w; /* a row has a multiple of 2 * LANES numbers */
    uint16_t *y;
    int64_t rows, in, out;
    int32_t threads;
};

/* y [rows][OUTPUTS]; prefetches rows of weights from `ahead` on. */
INLINE void multiply(const struct product *call, int64_t row, int64_t output, int rows, int64_t ahead, int prefetched)
{
    const int64_t in = call->in;
    const uint16_t *x = call->x + row * in, *w = call->w + output * in, *next = call->w + ahead * in;
    __m512 sums[ROWS][OUTPUTS];
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < OUTPUTS; k++) sums[i][k] = _mm512_setzero_ps();
    for (int64_t channel = 0; channel < in; channel += 2 * LANES) {
        __m512bh weights[OUTPUTS];
        for (int i = 0; i < prefetched; i++) __builtin_prefetch(next + i * in + channel, 0, 2);
        for (int k = 0; k < OUTPUTS; k++) weights[k] = (__m512bh)_mm512_loadu_si512(w + k * in + channel);
        for (int i = 0; i < rows; i++) {
            __m512bh numbers = (__m512bh)_mm512_loadu_si512(x + i * in + channel);
            for (int k = 0; k < OUTPUTS; k++) sums[i][k] = _mm512_dpbf16_ps(sums[i][k], numbers, weights[k]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < OUTPUTS; k++)
            call->y[(row + i) * call->out + output + k] = rounded((floats){0} + _mm512_reduce_add_ps(sums[i][k]))[0];
}

static void compute(const void *argument, int64_t index, char *scratch)
{
    const struct product *call = argument;
    const int64_t groups = (call->rows + ROWS - 1) / ROWS, share = (OUTPUTS + groups - 1) / groups;
    const int64_t last = (index + 1) * BLOCK < call->out ? (index + 1) * BLOCK : call->out;
    (void)scratch;
    for (int64_t output = index * BLOCK; output < last; output += OUTPUTS)
        for (int64_t group = 0; group < groups; group++) {
            int64_t row = group * ROWS, ahead = group * share, prefetched = OUTPUTS - ahead;
            if (prefetched > share) prefetched = share;
            if (prefetched < 0 || output + 2 * OUTPUTS > call->out) prefetched = 0;
            ahead += output + OUTPUTS;
            switch (call->rows - row) {
            case 1: multiply(call, row, output, 1, ahead, prefetched); break;
            case 2: multiply(call, row, output, 2, ahead, prefetched); break;
            case 3: multiply(call, row, output, 3, ahead, prefetched); break;
            case 4: multiply(call, row, output, 4, ahead, prefetched); break;
            default: multiply(call, row, output, ROWS, ahead, prefetched);
            }
        }
}

/* Returns 0. */
int few_rows(const struct product *call)
{
    return compute_all(compute, call, (call->out + BLOCK - 1) / BLOCK, call->threads, 0);
}
#endif
