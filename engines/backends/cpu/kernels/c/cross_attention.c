/* Softmax attention of one image's tokens over a prompt's, with the RMSNorm of queries and keys over all heads.
 *
 * Keys are laid out once, transposed, with all that multiplies a score but the query's RMS. Then a thread takes rows.
 * engines/backends/cpu/kernels/cross_attention.py has the caller and the reference.
 */
#include "blocks.h"
#include "vectors.h"

#define ROWS 8 /* queries that are computed together: of a block */
#define LEAST -1e30f

/* As _Attention in cross_attention.py. Rows are tokens, of bf16 or of floats. */
struct attention {
    const void *q;           /* [rows][heads][size] */
    const void *k, *v;       /* [tokens][heads][size], `stride` numbers from one token to the next */
    const float *q_weight;   /* [heads][size]; null without a norm */
    const float *k_weight;
    void *y;                 /* [rows][heads][size] */
    int64_t rows, tokens, stride, heads, size;
    int32_t bf16, threads;
    float eps;               /* of the norm */
};

struct job {
    const struct attention *call;
    int64_t padded_tokens, padded_size; /* multiples of LANES */
    float *keys;                        /* [heads][size][padded_tokens] */
    float *values;                      /* [heads][tokens][padded_size] */
};

INLINE float inverse_rms(const struct attention *call, const void *x, int64_t from, int bf16)
{
    const int64_t width = call->heads * call->size;
    floats squares = {0};
    for (int64_t i = 0; i < width; i += LANES) {
        floats value = load(x, from + i, bf16);
        squares += value * value;
    }
    return call->q_weight ? 1 / __builtin_sqrtf(sum_of(squares) / width + call->eps) : 1;
}

INLINE void lay_out(const struct job *job, int64_t token, int bf16)
{
    const struct attention *call = job->call;
    const int64_t size = call->size, from = token * call->stride;
    const float scale = inverse_rms(call, call->k, from, bf16) / __builtin_sqrtf(size);
    for (int64_t head = 0; head < call->heads; head++)
        for (int64_t i = 0; i < size; i++) {
            const int64_t channel = head * size + i;
            const float weight = call->q_weight ? call->q_weight[channel] * call->k_weight[channel] : 1;
            job->keys[channel * job->padded_tokens + token] = load_one(call->k, from + channel, bf16) * scale * weight;
            job->values[(head * call->tokens + token) * job->padded_size + i] = load_one(call->v, from + channel, bf16);
        }
}

static void lay_out_tokens(const void *argument, int64_t token, char *scratch)
{
    const struct job *job = argument;
    (void)scratch;
    if (job->call->bf16)
        lay_out(job, token, 1);
    else
        lay_out(job, token, 0);
}

/* Scores of ROWS queries [ROWS][width] with the tokens of a head, in powers of two: [ROWS][padded_tokens]. */
INLINE void multiply_keys(const struct job *job, const float *queries, int64_t width, const float *keys, float *scores)
{
    for (int64_t token = 0; token < job->padded_tokens; token += LANES) {
        floats sums[ROWS] = {0};
        for (int64_t i = 0; i < job->call->size; i++) {
            floats key = load(keys, i * job->padded_tokens + token, 0);
            for (int row = 0; row < ROWS; row++) sums[row] += queries[row * width + i] * key;
        }
        for (int row = 0; row < ROWS; row++)
            store(scores, row * job->padded_tokens + token, sums[row] * LOG2_E, 0);
    }
}

/* Scores of a row to weights of tokens. Returns their sum. */
INLINE float exponentiate(const struct job *job, float *scores)
{
    floats largest = (floats){0} + LEAST, sums = {0};
    float most = LEAST;
    for (int64_t token = job->call->tokens; token < job->padded_tokens; token++) scores[token] = LEAST;
    for (int64_t token = 0; token < job->padded_tokens; token += LANES)
        largest = larger_of(load(scores, token, 0), largest);
    for (int lane = 0; lane < LANES; lane++) most = largest[lane] > most ? largest[lane] : most;
    for (int64_t token = 0; token < job->padded_tokens; token += LANES) {
        floats score = load(scores, token, 0), weight = power_of_two(score - most) + (score - score); /* NaN stays */
        store(scores, token, weight, 0);
        sums += weight;
    }
    return sum_of(sums);
}

INLINE void compute_rows(const struct job *job, int64_t first, float *scratch, int bf16)
{
    const struct attention *call = job->call;
    const int64_t size = call->size, width = call->heads * size, room = width + LANES;
    float *queries = scratch, *results = queries + ROWS * width, *scores = results + ROWS * room;
    for (int64_t n = 0; n < ROWS; n++) {
        const int64_t row = first + n < call->rows ? first + n : call->rows - 1;
        const float scale = inverse_rms(call, call->q, row * width, bf16);
        for (int64_t i = 0; i < width; i += LANES)
            store(queries, n * width + i, load(call->q, row * width + i, bf16) * scale, 0);
    }
    for (int64_t head = 0; head < call->heads; head++) {
        const float *values = job->values + head * call->tokens * job->padded_size;
        float inverse[ROWS];
        multiply_keys(job, queries + head * size, width, job->keys + head * size * job->padded_tokens, scores);
        for (int row = 0; row < ROWS; row++) inverse[row] = 1 / exponentiate(job, scores + row * job->padded_tokens);
        for (int64_t i = 0; i < job->padded_size; i += LANES) { /* beyond the size: where the next head overwrites */
            floats sums[ROWS] = {0};
            for (int64_t token = 0; token < call->tokens; token++) {
                floats value = load(values, token * job->padded_size + i, 0);
                for (int row = 0; row < ROWS; row++) sums[row] += scores[row * job->padded_tokens + token] * value;
            }
            for (int row = 0; row < ROWS; row++)
                store(results, row * room + head * size + i, sums[row] * inverse[row], 0);
        }
    }
    for (int64_t row = 0; row < ROWS && first + row < call->rows; row++)
        for (int64_t i = 0; i < width; i += LANES)
            store(call->y, (first + row) * width + i, load(results, row * room + i, 0), bf16);
}

static void compute(const void *argument, int64_t index, char *scratch)
{
    const struct job *job = argument;
    if (job->call->bf16)
        compute_rows(job, index * ROWS, (float *)scratch, 1);
    else
        compute_rows(job, index * ROWS, (float *)scratch, 0);
}

static int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* Returns 0, or 1 without enough memory. */
int cross_attention(const struct attention *call)
{
    struct job job = {.call = call, .padded_tokens = padded(call->tokens), .padded_size = padded(call->size)};
    const int64_t of_row = 2 * call->heads * call->size + LANES + job.padded_tokens; /* numbers */
    job.keys = calloc(call->heads * call->size * job.padded_tokens, sizeof(float));
    job.values = calloc(call->heads * call->tokens * job.padded_size, sizeof(float));
    int failed = !job.keys || !job.values
        || compute_all(lay_out_tokens, &job, call->tokens, call->threads, 0)
        || compute_all(compute, &job, (call->rows + ROWS - 1) / ROWS, call->threads, ROWS * of_row * sizeof(float));
    free(job.keys);
    free(job.values);
    return failed;
}
