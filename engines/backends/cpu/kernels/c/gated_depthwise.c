/* The middle of a gated block (GLUMBConv): SiLU, depthwise 3x3 convolution, and the first half of the channels times
 * the SiLU of the second; and the rounding of rows to 8 bits, which its result and other tensors need.
 *
 * A thread takes blocks of rows. It goes through them with a few channels at a time, of which it keeps the last three
 * rows of the image in its cache, with SiLU applied. engines/backends/cpu/kernels/gated_depthwise.py has the callers.
 */
#include "blocks.h"
#include "vectors.h"

#define CHUNK (4 * LANES) /* channels that are computed together, at most */
#define MAX_BLOCK 8 /* rows of a block: of one more above and below, SiLU is computed again */

/* As _Gated in gated_depthwise.py. Images are [height][width][channels], of bf16 or of floats. */
struct gated {
    const void *x;        /* [height_in][width][2 * channels] */
    const void *scale;    /* [height_in * width], of the type of x: of its pixels; or null */
    const float *before;  /* [2 * channels], added to the scaled x; or null */
    const float *weights; /* [9][2 * channels] */
    const float *bias;    /* [2 * channels] */
    void *y;              /* [height][width][channels]; uint8 if it is rounded, as in round_rows */
    void *scales;         /* null, or the scales of y [height * width]: rounds y to 8 bits */
    int64_t height_in, height, width, channels;
    int32_t above;        /* 1: a row of zeros lies above x; 0: the first row of y lies between those of x */
    int32_t bf16;         /* the type of x, of its scale, and of y or its scales */
    int32_t silu;         /* applied to the scaled x */
    int32_t threads;
};

struct rows {
    const void *x;   /* [count][length] */
    uint8_t *levels; /* round(x / scale) + 128 */
    void *scales;    /* [count], of the type of x: the largest magnitude of a row / 127 */
    int64_t count, length;
    int32_t bf16, threads;
};

struct job {
    const struct gated *call;
    int64_t block;
};

#define SMALLEST 1.17549435e-38f

INLINE void round_row(const void *x, int64_t at, int64_t length, uint8_t *levels, void *scales, int64_t row, int bf16)
{
    integers largest = {0};
    for (int64_t i = 0; i < length; i += LANES) { /* magnitudes of floats are ordered as integers are; NaN is largest */
        integers magnitude = (integers)load(x, at + i, bf16) & 0x7fffffff, larger = magnitude > largest;
        largest = (magnitude & larger) | (largest & ~larger);
    }
    int32_t bits = 0;
    for (int lane = 0; lane < LANES; lane++) bits = largest[lane] > bits ? largest[lane] : bits;
    float scale;
    memcpy(&scale, &bits, 4);
    scale = scale > SMALLEST || scale != scale ? scale / 127 : SMALLEST;
    floats scales_of_row = (floats){0} + scale;
    if (bf16) scales_of_row = widened(rounded(scales_of_row));
    if (bf16)
        ((uint16_t *)scales)[row] = rounded(scales_of_row)[0];
    else
        ((float *)scales)[row] = scale;
    floats inverse = 1 / scales_of_row;
    for (int64_t i = 0; i < length; i += LANES) { /* 1.5 * 2**23 rounds a number into the lowest bits of its float */
        integers level = (integers)(load(x, at + i, bf16) * inverse + (1.5f * (1 << 23) + 128));
        bytes low = __builtin_convertvector(level & 0xff, bytes);
        memcpy(levels + at + i, &low, sizeof low);
    }
}

/* One row of the image, with its SiLU, to ring [width + 2][CHUNK] of the values and of the gates. */
INLINE void activate(
    const struct gated *call, int64_t row, int64_t channel, int64_t count, float *ring, int bf16)
{
    const int64_t both = 2 * call->channels;
    for (int half = 0; half < 2; half++, ring += (call->width + 2) * CHUNK) {
        if (row < 0 || row >= call->height_in) {
            memset(ring, 0, (call->width + 2) * CHUNK * sizeof(float));
            continue;
        }
        memset(ring, 0, CHUNK * sizeof(float));
        memset(ring + (call->width + 1) * CHUNK, 0, CHUNK * sizeof(float));
        const int64_t first = channel + half * call->channels;
        for (int64_t column = 0; column < call->width; column++) {
            const int64_t pixel = row * call->width + column;
            const float scale = call->scale ? load_one(call->scale, pixel, bf16) : 1;
            for (int64_t i = 0; i < count; i += LANES) {
                floats value = load(call->x, pixel * both + first + i, bf16);
                value *= scale;
                if (call->before) value += load(call->before, first + i, 0);
                if (call->silu) value = silu(value);
                store(ring, (column + 1) * CHUNK + i, value, 0);
            }
        }
    }
}

/* One row of y from three rows of the ring. */
INLINE void convolve(
    const struct gated *call, float *const *ring, int64_t channel, int64_t count, void *y,
    int64_t at, int bf16)
{
    const int64_t both = 2 * call->channels, halves_apart = (call->width + 2) * CHUNK;
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t value = channel + i, gate = value + call->channels;
        floats of_value[9], of_gate[9];
        for (int tap = 0; tap < 9; tap++) {
            of_value[tap] = load(call->weights, tap * both + value, 0);
            of_gate[tap] = load(call->weights, tap * both + gate, 0);
        }
        floats bias_of_value = load(call->bias, value, 0), bias_of_gate = load(call->bias, gate, 0);
        for (int64_t column = 0; column < call->width; column++) {
            floats values = bias_of_value, gates = bias_of_gate;
            for (int tap = 0; tap < 9; tap++) {
                const int64_t from = (column + tap % 3) * CHUNK + i;
                values += of_value[tap] * load(ring[tap / 3], from, 0);
                gates += of_gate[tap] * load(ring[tap / 3], halves_apart + from, 0);
            }
            store(y, at + column * call->channels + value, values * silu(gates), bf16);
        }
    }
}

INLINE void compute_rows(const struct job *job, int64_t first, char *scratch, int bf16)
{
    const struct gated *call = job->call;
    const int64_t last = first + job->block < call->height ? first + job->block : call->height;
    const int64_t of_row = call->width * call->channels, ring_row = 2 * (call->width + 2) * CHUNK;
    float *ring = (float *)scratch;
    void *y = call->scales ? (void *)(ring + 3 * ring_row) : call->y;
    const int64_t begin = call->scales ? first : 0; /* the row of the image that y begins with */
    for (int64_t channel = 0; channel < call->channels; channel += CHUNK) {
        const int64_t count = call->channels - channel < CHUNK ? call->channels - channel : CHUNK;
        for (int64_t row = first - 1; row <= last; row++) {
            activate(call, row + 1 - call->above, channel, count, ring + (row + 3) % 3 * ring_row, bf16);
            if (row <= first) continue;
            float *three[3];
            for (int i = 0; i < 3; i++) three[i] = ring + (row + 1 + i) % 3 * ring_row;
            convolve(call, three, channel, count, y, (row - 1 - begin) * of_row, bf16);
        }
    }
    if (call->scales)
        for (int64_t pixel = 0; pixel < (last - first) * call->width; pixel++)
            round_row(y, pixel * call->channels, call->channels, (uint8_t *)call->y + first * of_row, 
                      (char *)call->scales + first * call->width * (bf16 ? 2 : 4), pixel, bf16);
}

static void compute(const void *argument, int64_t index, char *scratch)
{
    const struct job *job = argument;
    if (job->call->bf16)
        compute_rows(job, index * job->block, scratch, 1);
    else
        compute_rows(job, index * job->block, scratch, 0);
}

/* Returns 0, or 1 without enough memory. */
int gated_depthwise(const struct gated *call)
{
    int64_t share = (call->height + call->threads - 1) / call->threads;
    struct job job = {call, share < MAX_BLOCK ? share : MAX_BLOCK};
    int64_t numbers = 6 * (call->width + 2) * CHUNK + (call->scales ? job.block * call->width * call->channels : 0);
    int64_t count = (call->height + job.block - 1) / job.block;
    return compute_all(compute, &job, count, call->threads, numbers * sizeof(float));
}

#define ROWS 16 /* of a block */

static void compute_rounding(const void *argument, int64_t index, char *scratch)
{
    const struct rows *call = argument;
    (void)scratch;
    for (int64_t row = index * ROWS; row < (index + 1) * ROWS && row < call->count; row++)
        if (call->bf16)
            round_row(call->x, row * call->length, call->length, call->levels, call->scales, row, 1);
        else
            round_row(call->x, row * call->length, call->length, call->levels, call->scales, row, 0);
}

int round_rows(const struct rows *call)
{
    return compute_all(compute_rounding, call, (call->count + ROWS - 1) / ROWS, call->threads, 0);
}
