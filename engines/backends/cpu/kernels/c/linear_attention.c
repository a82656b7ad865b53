/* ReLU linear attention of one image's tokens, with the RMSNorm of queries and keys over all heads.
 *
 * A query's RMS divides its result's numerator and denominator alike, so only its weight is applied. A thread takes
 * heads: the context of one stays in its cache. engines/backends/cpu/kernels/linear_attention.py has the caller
 * and the reference.
 */
#include "blocks.h"
#include "vectors.h"

#define ROWS 32  /* tokens whose numbers are widened together; a multiple of TOGETHER */
#define TOGETHER 8 /* sums at a time */
#define TINY 1e-15f /* added to the denominator, as upstream does */

/* As _Attention in linear_attention.py. Tensors are [rows][heads][size], of bf16 or of floats; a row is a token. */
struct attention {
    const void *q, *k, *v;
    const float *q_weight;   /* [heads][size]; null without a norm */
    const float *k_weight;
    void *y;
    int64_t rows, heads, size;
    int64_t to_row, to_head; /* numbers from one to the next, of q, k and v */
    int64_t y_to_row;        /* of y, whose heads are side by side */
    int32_t bf16, threads;
    float eps;               /* of the norm */
};

struct job {
    const struct attention *call;
    float *inverse; /* [rows]: of a key's RMS; null without a norm */
};

INLINE void measure_key(const struct job *job, int64_t row, int bf16)
{
    const struct attention *call = job->call;
    const int64_t width = call->heads * call->size;
    floats squares = {0};
    for (int64_t head = 0; head < call->heads; head++)
        for (int64_t i = 0; i < call->size; i += LANES) {
            floats value = load(call->k, row * call->to_row + head * call->to_head + i, bf16);
            squares += value * value;
        }
    job->inverse[row] = 1 / __builtin_sqrtf(sum_of(squares) / width + call->eps);
}

static void measure_keys(const void *argument, int64_t index, char *scratch)
{
    const struct job *job = argument;
    (void)scratch;
    for (int64_t row = index * ROWS; row < (index + 1) * ROWS && row < job->call->rows; row++)
        if (job->call->bf16)
            measure_key(job, row, 1);
        else
            measure_key(job, row, 0);
}

INLINE floats positive(floats x) { return (floats)((integers)x & ~(x < 0)); } /* NaN stays */

/* ReLU of queries or keys of a head, times its weights, to [ROWS][size]; rows beyond the last are zero. */
INLINE void widen(
    const struct attention *call, const void *x, const float *weight, const float *inverse, int64_t first, int64_t head,
    float *to, int bf16)
{
    const int64_t size = call->size;
    for (int64_t row = first; row < first + ROWS; row++, to += size)
        for (int64_t i = 0; i < size; i += LANES) {
            floats value = {0};
            if (row < call->rows) {
                value = load(x, row * call->to_row + head * call->to_head + i, bf16);
                if (inverse) value *= inverse[row];
                if (weight) value *= load(weight, head * size + i, 0);
                value = positive(value);
            }
            store(to, i, value, 0);
        }
}

/* context [size][size] += keys [ROWS][size] transposed times values [ROWS][size]; total [size] += sum of keys. */
INLINE void add_context(const float *keys, const float *values, int64_t size, float *context, float *total)
{
    for (int64_t j = 0; j < size; j += LANES) {
        floats sum = load(total, j, 0);
        for (int row = 0; row < ROWS; row++) sum += load(keys, row * size + j, 0);
        store(total, j, sum, 0);
        for (int64_t i = 0; i < size; i += TOGETHER) {
            floats sums[TOGETHER];
            for (int n = 0; n < TOGETHER; n++) sums[n] = load(context, (i + n) * size + j, 0);
            for (int row = 0; row < ROWS; row++) {
                floats value = load(values, row * size + j, 0);
                for (int n = 0; n < TOGETHER; n++) sums[n] += keys[row * size + i + n] * value;
            }
            for (int n = 0; n < TOGETHER; n++) store(context, (i + n) * size + j, sums[n], 0);
        }
    }
}

/* Results of TOGETHER queries [TOGETHER][size] to rows from `first` on. */
INLINE void apply(
    const struct attention *call, const float *queries, const float *context, const float *total, int64_t first,
    int64_t head, int bf16)
{
    const int64_t size = call->size;
    float inverse[TOGETHER];
    for (int n = 0; n < TOGETHER; n++) {
        floats sum = {0};
        for (int64_t i = 0; i < size; i += LANES) sum += load(queries, n * size + i, 0) * load(total, i, 0);
        inverse[n] = 1 / (sum_of(sum) + TINY);
    }
    for (int64_t j = 0; j < size; j += LANES) {
        floats sums[TOGETHER] = {0};
        for (int64_t i = 0; i < size; i++) {
            floats of_key = load(context, i * size + j, 0);
            for (int n = 0; n < TOGETHER; n++) sums[n] += queries[n * size + i] * of_key;
        }
        for (int n = 0; n < TOGETHER && first + n < call->rows; n++)
            store(call->y, (first + n) * call->y_to_row + head * size + j, sums[n] * inverse[n], bf16);
    }
}

INLINE void compute_head(const struct job *job, int64_t head, float *scratch, int bf16)
{
    const struct attention *call = job->call;
    const int64_t size = call->size;
    float *context = scratch, *total = context + size * size, *keys = total + size, *values = keys + ROWS * size;
    memset(context, 0, (size + 1) * size * sizeof(float));
    for (int64_t first = 0; first < call->rows; first += ROWS) {
        widen(call, call->k, call->k_weight, job->inverse, first, head, keys, bf16);
        for (int64_t row = 0; row < ROWS; row++) /* those of zero keys beyond the last row count for nothing */
            for (int64_t i = 0; i < size; i += LANES) {
                int64_t from = (first + row < call->rows ? first + row : call->rows - 1) * call->to_row;
                store(values, row * size + i, load(call->v, from + head * call->to_head + i, bf16), 0);
            }
        add_context(keys, values, size, context, total);
    }
    for (int64_t first = 0; first < call->rows; first += ROWS) {
        widen(call, call->q, call->q_weight, 0, first, head, keys, bf16);
        for (int64_t row = 0; row < ROWS; row += TOGETHER)
            apply(call, keys + row * size, context, total, first + row, head, bf16);
    }
}

static void compute_heads(const void *argument, int64_t head, char *scratch)
{
    const struct job *job = argument;
    if (job->call->bf16)
        compute_head(job, head, (float *)scratch, 1);
    else
        compute_head(job, head, (float *)scratch, 0);
}

/* Returns 0, or 1 without enough memory. */
int linear_attention(const struct attention *call)
{
    const size_t scratch = (call->size + 1 + 2 * ROWS) * call->size * sizeof(float);
    struct job job = {call, 0};
    int failed = 0;
    if (call->k_weight)
        failed = !(job.inverse = malloc(call->rows * sizeof(float)))
            || compute_all(measure_keys, &job, (call->rows + ROWS - 1) / ROWS, call->threads, 0);
    failed = failed || compute_all(compute_heads, &job, call->heads, call->threads, scratch);
    free(job.inverse);
    return failed;
}
