/* Parts that compute in user mode. */
#define _DEFAULT_SOURCE
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "compare.h"

#define SEED 0x2545f4914f6cdd1d

/* What the compiler must not reason about from the outside, or a part would fold away. */
#define OPAQUE __attribute__((noinline, noclone))

/* Keeps the compiler from seeing through a pointer. */
static inline void *hidden(void *pointer)
{
    __asm__("" : "+r"(pointer));
    return pointer;
}

/* In huge pages, if there are any: some kernels give them to everybody and some to who asks. */
static void *memory(size_t size)
{
    enum { HUGE = 2 << 20 };
    size = (size + HUGE - 1) / HUGE * HUGE;
    void *found = aligned_alloc(HUGE, size);
    if (!found)
        fail("aligned_alloc");
    madvise(found, size, MADV_HUGEPAGE);
    return found;
}

uint64_t integer_loop(uint64_t count)
{
    uint64_t state = SEED, sum = 0;
    start_clock();
    while (count--)
        sum += xorshift(&state);
    stop_clock();
    return sum;
}

/* CRC-32 (the reflected polynomial of IEEE 802.3) over 64 KiB, `count` times. */
uint64_t crc(uint64_t count)
{
    static uint32_t table[256];
    static uint8_t data[64 << 10];
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++)
            value = value >> 1 ^ (value & 1 ? 0xedb88320 : 0);
        table[byte] = value;
    }
    uint64_t state = SEED;
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = xorshift(&state);
    uint32_t value = 0;
    start_clock();
    while (count--) {
        value = ~value;
        for (size_t i = 0; i < sizeof data; i++)
            value = table[(value ^ data[i]) & 0xff] ^ value >> 8;
        value = ~value;
    }
    stop_clock();
    return value;
}

static OPAQUE int ascending(const void *left, const void *right)
{
    int a = *(const int *)left, b = *(const int *)right;
    return (a > b) - (a < b);
}

/* The C library's sort of `count` integers. */
uint64_t quicksort(uint64_t count)
{
    int *numbers = memory(count * sizeof *numbers);
    uint64_t state = SEED, sum = 0;
    for (uint64_t i = 0; i < count; i++)
        numbers[i] = xorshift(&state);
    start_clock();
    qsort(numbers, count, sizeof *numbers, ascending);
    stop_clock();
    for (uint64_t i = 0; i < count; i++)
        sum = mix(sum, numbers[i]);
    free(numbers);
    return sum;
}

static uint64_t bits(double value)
{
    uint64_t found;
    memcpy(&found, &value, sizeof found);
    return found;
}

/* A multiplication, a division and a square root after each other, exact by IEEE 754. */
uint64_t floating_point(uint64_t count)
{
    double x = 1.5, sum = 0;
    start_clock();
    while (count--) {
        x = sqrt(x * 1.25 + 3.0 / x);
        sum += x;
    }
    stop_clock();
    return mix(bits(x), bits(sum));
}

#define SIDE 256

/* Row by row, which caches like and compilers make packed operations of. */
static OPAQUE void multiply(double (*restrict product)[SIDE], double (*restrict left)[SIDE],
                            double (*restrict right)[SIDE])
{
    memset(product, 0, SIDE * sizeof *product);
    for (int row = 0; row < SIDE; row++)
        for (int i = 0; i < SIDE; i++) {
            double factor = left[row][i];
            for (int column = 0; column < SIDE; column++)
                product[row][column] += factor * right[i][column];
        }
}

uint64_t matrix(uint64_t count)
{
    static double left[SIDE][SIDE], right[SIDE][SIDE], product[SIDE][SIDE];
    uint64_t state = SEED, sum = 0;
    for (int row = 0; row < SIDE; row++)
        for (int column = 0; column < SIDE; column++) {
            left[row][column] = (int)(xorshift(&state) % 2001) / 1000.0 - 1.0;
            right[row][column] = (int)(xorshift(&state) % 2001) / 1000.0 - 1.0;
        }
    start_clock();
    while (count--)
        multiply(product, left, right);
    stop_clock();
    for (int row = 0; row < SIDE; row++)
        for (int column = 0; column < SIDE; column++)
            sum = mix(sum, bits(product[row][column]));
    return sum;
}

struct node {
    struct node *next;
    uint64_t number;
    char rest_of_line[48];
};

/* Follows pointers through 4 MiB, one cache line each, in a single random cycle. */
uint64_t chase(uint64_t count)
{
    enum { NODES = (4 << 20) / sizeof(struct node) };
    struct node *nodes = memory(NODES * sizeof *nodes);
    uint32_t *order = memory(NODES * sizeof *order);
    uint64_t state = SEED, sum = 0;
    for (uint32_t i = 0; i < NODES; i++)
        order[i] = i;
    for (uint32_t i = NODES - 1; i > 0; i--) {
        uint32_t other = xorshift(&state) % (i + 1), own = order[i];
        order[i] = order[other];
        order[other] = own;
    }
    for (uint32_t i = 0; i < NODES; i++) {
        nodes[order[i]].next = &nodes[order[(i + 1) % NODES]];
        nodes[order[i]].number = i;
    }
    const struct node *at = nodes;
    start_clock();
    while (count--) {
        at = at->next;
        sum += at->number;
    }
    stop_clock();
    free(order);
    free(nodes);
    return sum;
}

/* `memcpy` of 8 MiB to and fro. */
uint64_t copy(uint64_t count)
{
    enum { SIZE = 8 << 20, WORDS = SIZE / sizeof(uint64_t) };
    uint64_t *from = memory(SIZE), *to = memory(SIZE);
    uint64_t state = SEED, sum = 0;
    for (int i = 0; i < WORDS; i++)
        from[i] = xorshift(&state);
    memset(hidden(to), 0, SIZE);
    start_clock();
    for (uint64_t round = 0; round < count; round++) {
        memcpy(hidden(to), hidden(from), SIZE);
        to[round % WORDS] += round;
        uint64_t *other = from;
        from = to;
        to = other;
    }
    stop_clock();
    for (int i = 0; i < WORDS; i += 61)
        sum = mix(sum, from[i]);
    free(from);
    free(to);
    return sum;
}

/* Without the attribute the compiler makes a loop of one of the two calls. */
static OPAQUE __attribute__((optimize("no-optimize-sibling-calls"))) uint64_t fib(unsigned n)
{
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

uint64_t fibonacci(uint64_t count)
{
    uint64_t sum = 0;
    start_clock();
    while (count--)
        sum = mix(sum, fib(27));
    stop_clock();
    return sum;
}

#define STEP(n) \
    static OPAQUE uint64_t step##n(uint64_t x) { return (x ^ (n + 1)) * (2 * n + 3) + n; }
STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7)
STEP(8) STEP(9) STEP(10) STEP(11) STEP(12) STEP(13) STEP(14) STEP(15)

/* Calls through a table of 16, in an order that no predictor of the last target knows. */
uint64_t indirect_calls(uint64_t count)
{
    static uint64_t (*const steps[16])(uint64_t) = {
        step0, step1, step2,  step3,  step4,  step5,  step6,  step7,
        step8, step9, step10, step11, step12, step13, step14, step15,
    };
    uint64_t (*const *table)(uint64_t) = hidden((void *)steps);
    uint64_t value = SEED;
    start_clock();
    for (uint64_t i = 0; i < count; i++)
        value = table[(i * 7 + (i >> 4)) & 15](value);
    stop_clock();
    return value;
}
