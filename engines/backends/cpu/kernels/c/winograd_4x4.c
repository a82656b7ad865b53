/* 3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, Fast Algorithms for Convolutional
 * Neural Networks, section 4.3): 36 products of channels for a tile of 4x4 pixels, a quarter of the direct 144.
 *
 * The points 0, 3/2, -3/2, 2/3, -2/3 and infinity lose 7 dB less in bf16 than the usual 0, 1, -1, 2, -2. Transforms and
 * sums are fp32. Each thread takes blocks of tiles and does all steps with one before the next, so that its numbers
 * stay in the cache: tiles to points, products with the weights of a panel of output channels, points to pixels.
 *
 * engines/backends/cpu/kernels/winograd_4x4.py has the weights' layout, the callers and the reference.
 */
#include "blocks.h"
#include "vectors.h"

#define POINTS 36
#define VECTORS (REGISTERS / 8) /* of a panel: with ROWS, three quarters of the registers hold sums */
#define PANEL (LANES * VECTORS) /* output channels that are computed together */
#define ROWS 6                  /* tiles that are multiplied together */
#define BLOCK 48                /* tiles of a block, at most */

/* As _Call in winograd_4x4.py. Images are [height][width][channels], of bf16 or of floats. */
struct call {
    const void *x;           /* [height_in][width][in] */
    void *y;                 /* [height][width][out], or [2 * height][2 * width][out / 4] of four phases */
    const void *weights;     /* of a panel, of a used point: [in / 2][PANEL][2] of bf16, or [in][PANEL] of floats */
    const float *bias;       /* [out] */
    const float *norm;       /* weight and bias [2][out] of an RMSNorm whose result is added to y; or null */
    const uint64_t *used;    /* of each panel: a bit for each point whose weights are not all zero */
    int64_t height_in, height, width, in, out;
    int32_t above;           /* 1: a row of zeros lies above x; 0: the first row of y lies between those of x */
    int32_t bf16;            /* the type of x and y */
    int32_t silu;            /* applied to the result */
    int32_t phases;          /* 1, or 4 whose pixels are interleaved: (row % 2, column % 2) */
    int32_t stride;          /* of the channels of x that are added to a phase: 1 or 2; 0: nothing is added */
    int32_t threads;
    float eps;               /* of the norm */
};

struct job {
    const struct call *call;
    const void *zeros; /* a pixel outside of x */
    int64_t tiles_x, tiles, block;
};

#define A (3.0f / 2)
#define B (2.0f / 3) /* A * B = 1 */
#define BOTH (A * A + B * B)

/* Six neighbours d[0], d[step]... evaluated at the points, to t[0], t[step]... */
INLINE void to_points(const floats *d, floats *t, int step)
{
    floats d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
    floats even_a = d4 - B * B * d2, odd_a = A * (d3 - B * B * d1);
    floats even_b = d4 - A * A * d2, odd_b = B * (d3 - A * A * d1);
    t[0] = d[0] + (d4 - BOTH * d2);
    t[step] = even_a + odd_a;
    t[2 * step] = even_a - odd_a;
    t[3 * step] = even_b + odd_b;
    t[4 * step] = even_b - odd_b;
    t[5 * step] = d1 + (d[5 * step] - BOTH * d3);
}

/* Products at six points to four neighbours t[0], t[step]... */
INLINE void from_points(const floats *m, floats *t, int step)
{
    floats sum_a = m[step] + m[2 * step], difference_a = m[step] - m[2 * step];
    floats sum_b = m[3 * step] + m[4 * step], difference_b = m[3 * step] - m[4 * step];
    t[0] = m[0] + sum_a + sum_b;
    t[step] = A * difference_a + B * difference_b;
    t[2 * step] = A * A * sum_a + B * B * sum_b;
    t[3 * step] = A * A * A * difference_a + (B * B * B * difference_b + m[5 * step]);
}

/* Tiles of x to v [POINTS][block][in]. */
INLINE void transform(const struct job *job, int64_t first, int64_t count, void *v, int bf16, int products)
{
    const struct call *call = job->call;
    const int size = bf16 ? 2 : 4;
    for (int64_t tile = 0; tile < count; tile++) {
        int64_t top = 4 * ((first + tile) / job->tiles_x) - call->above, left = 4 * ((first + tile) % job->tiles_x) - 1;
        const char *pixels[POINTS];
        for (int i = 0; i < POINTS; i++) {
            int64_t row = top + i / 6, column = left + i % 6;
            int inside = row >= 0 && row < call->height_in && column >= 0 && column < call->width;
            pixels[i] = inside ? (const char *)call->x + (row * call->width + column) * call->in * size : job->zeros;
        }
        for (int64_t channel = 0; channel < call->in; channel += LANES) {
            floats d[POINTS], rows[POINTS], points[POINTS];
            for (int i = 0; i < POINTS; i++) d[i] = load(pixels[i], channel, bf16);
            for (int i = 0; i < 6; i++) to_points(d + i, rows + i, 6);
            for (int i = 0; i < 6; i++) to_points(rows + 6 * i, points + 6 * i, 1);
            for (int i = 0; i < POINTS; i++)
                store(v, (i * job->block + tile) * call->in + channel, points[i], products);
        }
    }
}

/* m [ROWS][PANEL] = a [ROWS][in] times the weights w of a point and a panel. */
INLINE void multiply(const void *a, const void *w, int64_t in, float *m, int products)
{
    floats sums[ROWS][VECTORS] = {0};
#if BF16_PRODUCTS
    if (products) {
        for (int64_t pair = 0; pair < in / 2; pair++) {
            __m512bh columns[VECTORS];
            for (int i = 0; i < VECTORS; i++)
                columns[i] = (__m512bh)_mm512_loadu_si512((const uint16_t *)w + 2 * (pair * PANEL + i * LANES));
            for (int row = 0; row < ROWS; row++) {
                int32_t two;
                memcpy(&two, (const uint16_t *)a + row * in + 2 * pair, sizeof two);
                for (int i = 0; i < VECTORS; i++)
                    sums[row][i] = (floats)_mm512_dpbf16_ps(
                        (__m512)sums[row][i], (__m512bh)_mm512_set1_epi32(two), columns[i]);
            }
        }
    } else
#endif
        for (int64_t channel = 0; channel < in; channel++) {
            floats columns[VECTORS];
            for (int i = 0; i < VECTORS; i++) columns[i] = load(w, channel * PANEL + i * LANES, 0);
            for (int row = 0; row < ROWS; row++)
                for (int i = 0; i < VECTORS; i++)
                    sums[row][i] += ((const float *)a)[row * in + channel] * columns[i];
        }
    for (int row = 0; row < ROWS; row++)
        for (int i = 0; i < VECTORS; i++) store(m, row * PANEL + i * LANES, sums[row][i], 0);
    (void)products;
}

/* Products m [POINTS][block][PANEL] to pixels of y; with a norm, to rows [block][16][out]. */
INLINE void combine(
    const struct job *job, int64_t first, int64_t count, int64_t panel, const float *m, void *rows, int bf16)
{
    const struct call *call = job->call;
    const int64_t channels = call->out / call->phases, begin = panel * PANEL;
    const int64_t phase = begin / channels, row_of_two = phase / 2, column_of_two = phase % 2;
    const uint64_t used = call->used[panel];
    for (int64_t tile = 0; tile < count; tile++) {
        int64_t top = 4 * ((first + tile) / job->tiles_x), left = 4 * ((first + tile) % job->tiles_x);
        for (int64_t lane = 0; lane < PANEL; lane += LANES) {
            floats points[POINTS], half[POINTS], pixels[16], bias = load(call->bias, begin + lane, 0);
            for (int i = 0; i < POINTS; i++)
                points[i] = used >> i & 1 ? load(m, (i * job->block + tile) * PANEL + lane, 0) : (floats){0};
            for (int i = 0; i < 6; i++) from_points(points + i, half + i, 6);
            for (int i = 0; i < 4; i++) from_points(half + 6 * i, pixels + 4 * i, 1);
            for (int i = 0; i < 16; i++) {
                int64_t row = top + i / 4, column = left + i % 4, channel = begin + lane - phase * channels;
                if (row >= call->height || column >= call->width) continue;
                floats value = pixels[i] + bias;
                if (call->silu) value = silu(value);
                if (call->norm) {
                    store(rows, (tile * 16 + i) * call->out + begin + lane, value, bf16);
                    continue;
                }
                if (call->stride) { /* x at this pixel: its row in x is one further where none of zeros lies above */
                    int64_t at = ((row + 1 - call->above) * call->width + column) * call->in;
                    value += call->stride == 1 ? load(call->x, at + channel, bf16)
                                               : load_second(call->x, at + 2 * channel + row_of_two, bf16);
                }
                int64_t pixel = call->phases == 1 ? row * call->width + column
                                : (2 * row + row_of_two) * 2 * call->width + 2 * column + column_of_two;
                store(call->y, pixel * channels + channel, value, bf16);
            }
        }
    }
}

/* Adds RMSNorm(rows) to the pixels of y. */
INLINE void add_norm(const struct job *job, int64_t first, int64_t count, const void *rows, int bf16)
{
    const struct call *call = job->call;
    for (int64_t tile = 0; tile < count; tile++)
        for (int i = 0; i < 16; i++) {
            int64_t row = 4 * ((first + tile) / job->tiles_x) + i / 4;
            int64_t column = 4 * ((first + tile) % job->tiles_x) + i % 4;
            if (row >= call->height || column >= call->width) continue;
            int64_t from = (tile * 16 + i) * call->out, to = (row * call->width + column) * call->out;
            floats squares = {0}, root = {0};
            for (int64_t c = 0; c < call->out; c += LANES) {
                floats value = load(rows, from + c, bf16);
                squares += value * value;
            }
            root += 1 / __builtin_sqrtf(sum_of(squares) / call->out + call->eps);
            for (int64_t c = 0; c < call->out; c += LANES) {
                floats weight = load(call->norm, c, 0), bias = load(call->norm, call->out + c, 0);
                floats normed = load(rows, from + c, bf16) * root * weight + bias;
                store(call->y, to + c, load(call->y, to + c, bf16) + normed, bf16);
            }
        }
}

INLINE void compute_tiles(const struct job *job, int64_t first, char *scratch, int bf16, int products)
{
    const struct call *call = job->call;
    const int64_t count = job->tiles - first < job->block ? job->tiles - first : job->block, size = products ? 2 : 4;
    float *m = (float *)scratch;
    char *v = (char *)(m + POINTS * job->block * PANEL), *rows = v + POINTS * job->block * call->in * size;
    const char *weights = call->weights;
    transform(job, first, count, v, bf16, products);
    for (int64_t panel = 0; panel < call->out / PANEL; panel++) {
        for (int64_t point = 0; point < POINTS; point++) {
            if (!(call->used[panel] >> point & 1)) continue;
            for (int64_t tile = point * job->block; tile < point * job->block + count; tile += ROWS)
                multiply(v + tile * call->in * size, weights, call->in, m + tile * PANEL, products);
            weights += call->in * PANEL * size;
        }
        combine(job, first, count, panel, m, rows, bf16);
    }
    if (call->norm) add_norm(job, first, count, rows, bf16);
}

static void compute(const void *argument, int64_t index, char *scratch)
{
    const struct job *job = argument;
    if (job->call->bf16)
        compute_tiles(job, index * job->block, scratch, 1, BF16_PRODUCTS);
    else
        compute_tiles(job, index * job->block, scratch, 0, 0);
}

/* Returns 0, or 1 without enough memory. */
int winograd(const struct call *call)
{
    int64_t tiles_x = (call->width + 3) / 4, tiles = tiles_x * ((call->height + 3) / 4);
    int64_t share = (tiles + call->threads - 1) / call->threads;
    int64_t block = share < BLOCK ? (share + ROWS - 1) / ROWS * ROWS : BLOCK;
    int64_t of_tile = POINTS * (PANEL + call->in) + 16 * call->out; /* numbers */
    void *zeros = calloc(call->in, sizeof(float));
    struct job job = {call, zeros, tiles_x, tiles, block};
    int failed = !zeros
        || compute_all(compute, &job, (tiles + block - 1) / block, call->threads, block * of_tile * sizeof(float));
    free(zeros);
    return failed;
}

int panel(void) { return PANEL; }
