/* Work that is divided into blocks, on several threads: those of torch's OpenMP, where it is gcc's. Threads of our own
 * would compete with them, because they spin for milliseconds after an operation. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#define MAX_THREADS 256

typedef void compute_block(const void *call, int64_t block, char *scratch);

struct blocks {
    compute_block *compute;
    const void *call;
    int64_t count;
    char *scratch;
    size_t scratch_bytes; /* of a thread, a multiple of 64 */
    atomic_long next_block, next_thread;
};

static inline void *compute_blocks(void *argument)
{
    struct blocks *blocks = argument;
    char *scratch = blocks->scratch + atomic_fetch_add(&blocks->next_thread, 1) * blocks->scratch_bytes;
    for (;;) {
        int64_t block = atomic_fetch_add(&blocks->next_block, 1);
        if (block >= blocks->count) return 0;
        blocks->compute(blocks->call, block, scratch);
    }
}

extern void GOMP_parallel(void (*run)(void *), void *argument, unsigned threads, unsigned flags) __attribute__((weak));

static inline void compute_in_team(void *argument) { compute_blocks(argument); }

static inline void compute_on_own_threads(struct blocks *blocks, int threads)
{
    pthread_t others[MAX_THREADS];
    int started = 0;
    while (started < threads - 1 && !pthread_create(&others[started], 0, compute_blocks, blocks)) started++;
    compute_blocks(blocks);
    for (int i = 0; i < started; i++) pthread_join(others[i], 0);
}

/* Computes blocks 0 to count - 1; each thread has `bytes` of its own. Returns 0, or 1 without enough memory. */
static inline int compute_all(compute_block *compute, const void *call, int64_t count, int threads, size_t bytes)
{
    struct blocks blocks = {.compute = compute, .call = call, .count = count, .scratch_bytes = (bytes + 63) / 64 * 64};
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (bytes && !(blocks.scratch = aligned_alloc(64, threads * blocks.scratch_bytes))) return 1;
    if (threads == 1)
        compute_blocks(&blocks);
    else if (GOMP_parallel)
        GOMP_parallel(compute_in_team, &blocks, threads, 0);
    else
        compute_on_own_threads(&blocks, threads);
    free(blocks.scratch);
    return 0;
}
