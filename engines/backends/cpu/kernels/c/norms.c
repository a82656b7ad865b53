/* What lies between two products of tokens: the sum of the residual stream, LayerNorm and modulation, in one pass.
 * engines/backends/cpu/kernels/norms.py has the callers and the reference.
 */
#include "blocks.h"
#include "vectors.h"

#define ROWS 16 /* of a block */

/* As _Norm in norms.py. Tensors are [rows][length], of bf16 or of floats. */
struct norm {
    const void *x;
    const void *added;  /* null: nothing is added */
    const float *gate;  /* [length], of what is added; null: 1 */
    void *sum;          /* x + gate * added */
    const float *shift; /* [length] */
    const float *scale; /* [length] */
    void *normed;       /* LayerNorm(sum) * (1 + scale) + shift; or null */
    int64_t rows, length;
    int32_t bf16, threads;
    float eps;
};

INLINE void compute_row(const struct norm *call, int64_t row, float *sums, int bf16)
{
    const int64_t length = call->length, first = row * length;
    floats total = {0}, squares = {0}, mean = {0}, inverse = {0};
    for (int64_t i = 0; i < length; i += LANES) {
        floats value = load(call->x, first + i, bf16);
        if (call->added) {
            floats added = load(call->added, first + i, bf16);
            value += call->gate ? load(call->gate, i, 0) * added : added;
            store(call->sum, first + i, value, bf16);
        }
        store(sums, i, value, 0);
        total += value;
    }
    if (!call->normed) return;
    mean += sum_of(total) / length;
    for (int64_t i = 0; i < length; i += LANES) {
        floats distance = load(sums, i, 0) - mean;
        squares += distance * distance;
    }
    inverse += 1 / __builtin_sqrtf(sum_of(squares) / length + call->eps);
    for (int64_t i = 0; i < length; i += LANES) {
        floats value = (load(sums, i, 0) - mean) * inverse;
        store(call->normed, first + i, value * (1 + load(call->scale, i, 0)) + load(call->shift, i, 0), bf16);
    }
}

static void compute(const void *argument, int64_t index, char *scratch)
{
    const struct norm *call = argument;
    for (int64_t row = index * ROWS; row < (index + 1) * ROWS && row < call->rows; row++)
        if (call->bf16)
            compute_row(call, row, (float *)scratch, 1);
        else
            compute_row(call, row, (float *)scratch, 0);
}

/* Returns 0, or 1 without enough memory. */
int modulated_norm(const struct norm *call)
{
    return compute_all(compute, call, (call->rows + ROWS - 1) / ROWS, call->threads, call->length * sizeof(float));
}
