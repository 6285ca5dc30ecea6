/* The parts that `cargo xtask compare` times: what each computes and how often.
 *
 * A part does the same work on every machine and ends with a number that depends on all of it, so
 * that machines can be held against each other. Nothing in it may depend on the machine: neither
 * on its clock, nor on process IDs, nor on addresses.
 */
#ifndef COMPARE_H
#define COMPARE_H

#include <stdint.h>

enum kind {
    USER,   /* stays in user mode but for its page faults */
    SYSTEM, /* is about the kernel */
};

struct part {
    const char *name;
    enum kind kind;
    /* How often `run` does its work. */
    uint64_t count;
    /* Returns the checksum. */
    uint64_t (*run)(uint64_t count);
};

uint64_t integer_loop(uint64_t count);
uint64_t crc(uint64_t count);
uint64_t quicksort(uint64_t count);
uint64_t floating_point(uint64_t count);
uint64_t matrix(uint64_t count);
uint64_t chase(uint64_t count);
uint64_t copy(uint64_t count);
uint64_t fibonacci(uint64_t count);
uint64_t indirect_calls(uint64_t count);

uint64_t system_calls(uint64_t count);
uint64_t fresh_memory(uint64_t count);
uint64_t processes(uint64_t count);
uint64_t ping_pong(uint64_t count);

/* A part calls these around what is to be timed; the rest of it is preparation and checking. With
 * several copies at once, `start_clock` waits for all of them. */
void start_clock(void);
void stop_clock(void);

/* Prints why and ends the process; as init, the machine. */
_Noreturn void fail(const char *what);

/* The next of a sequence of well mixed numbers; `state` must not be 0. */
static inline uint64_t xorshift(uint64_t *state)
{
    uint64_t x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

/* Mixes `value` into `sum`, so that order counts. */
static inline uint64_t mix(uint64_t sum, uint64_t value)
{
    return (sum ^ value) * 0x9e3779b97f4a7c15 + (sum >> 29);
}

#endif
