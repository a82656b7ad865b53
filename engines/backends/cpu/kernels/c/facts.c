/* What callers need to know of the library. */
#include "blocks.h"
#include "vectors.h"

int lanes(void) { return LANES; }

int bf16_products(void) { return BF16_PRODUCTS; }

int shares_threads(void) { return GOMP_parallel != 0; }
