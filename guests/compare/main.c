/* Runs the parts and prints a line for each:
 *
 *     compare: part <user|system> <name> <checksum> <microseconds>
 *
 * between `compare: start` and `compare: end <microseconds>`. A failure prints
 * `compare: failed: <what>`.
 *
 * It is told what to do by its environment, which is also how a kernel hands words of its command
 * line to init:
 *
 *     compare_parts=a,b    only these parts
 *     compare_divide=10    a tenth of the work
 *     compare_copies=2     each part in that many processes at once, each on a processor of its
 *                          own; the time is the slowest's
 *
 * As init it ends by switching the machine off.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "compare.h"

#define MOST_COPIES 16

static const struct part parts[] = {
    {"integer-loop", USER, 200000000, integer_loop},
    {"crc", USER, 2500, crc},
    {"quicksort", USER, 1000000, quicksort},
    {"floating-point", USER, 10000000, floating_point},
    {"matrix", USER, 3, matrix},
    {"chase", USER, 10000000, chase},
    {"memcpy", USER, 40, copy},
    {"fibonacci", USER, 60, fibonacci},
    {"indirect-calls", USER, 30000000, indirect_calls},
    {"getppid", SYSTEM, 1000000, system_calls},
    {"fresh-memory", SYSTEM, 25, fresh_memory},
    {"fork", SYSTEM, 500, processes},
    {"ping-pong", SYSTEM, 10000, ping_pong},
};

static void switch_off(void)
{
    sync();
    reboot(RB_POWER_OFF);
    reboot(RB_AUTOBOOT);
}

_Noreturn void fail(const char *what)
{
    printf("compare: failed: %s\n", what);
    fflush(stdout);
    if (getpid() == 1)
        switch_off();
    _exit(1);
}

static uint64_t microseconds(void)
{
    struct timespec now;
    if (clock_gettime(CLOCK_MONOTONIC, &now))
        fail("clock_gettime");
    return now.tv_sec * 1000000ull + now.tv_nsec / 1000;
}

/* What copies of a part share. */
static struct copies {
    atomic_int waited_for;
    struct result {
        uint64_t sum, time;
    } results[MOST_COPIES];
} *copies;

static uint64_t started, stopped;

void start_clock(void)
{
    atomic_fetch_sub(&copies->waited_for, 1);
    while (atomic_load(&copies->waited_for) > 0)
        sched_yield();
    started = microseconds();
}

void stop_clock(void)
{
    stopped = microseconds();
}

static struct result timed(const struct part *part, uint64_t count)
{
    uint64_t sum = part->run(count);
    return (struct result){sum, stopped - started};
}

static uint64_t setting(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    char *end = NULL;
    uint64_t value = text ? strtoull(text, &end, 10) : otherwise;
    if (text && (end == text || *end || value == 0))
        fail(name);
    return value;
}

/* Whether `name` is among the names in `list`, which commas separate. */
static int is_in(const char *list, const char *name)
{
    size_t length = strlen(name);
    for (const char *at = list; at; at = strchr(at, ',')) {
        at += *at == ',';
        if (!strncmp(at, name, length) && (at[length] == ',' || !at[length]))
            return 1;
    }
    return 0;
}

static void stay_on(int processor)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(processor, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        fail("sched_setaffinity");
}

/* Runs a part in `number` processes at once; their sum, which must be the same, and the slowest's
 * time. */
static struct result side_by_side(const struct part *part, uint64_t count, int number)
{
    fflush(stdout);
    for (int copy = 0; copy < number; copy++) {
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        if (child == 0) {
            stay_on(copy);
            copies->results[copy] = timed(part, count);
            _exit(0);
        }
    }
    for (int copy = 0; copy < number; copy++) {
        int status;
        if (wait(&status) < 0 || status)
            fail("a copy");
    }
    struct result found = copies->results[0];
    for (int copy = 1; copy < number; copy++) {
        const struct result *other = &copies->results[copy];
        if (other->sum != found.sum)
            fail("the copies' checksums differ");
        if (other->time > found.time)
            found.time = other->time;
    }
    return found;
}

static void run(const struct part *part, uint64_t divide, int number)
{
    uint64_t count = part->count / divide ? part->count / divide : 1;
    copies->waited_for = number ? number : 1;
    struct result found = number ? side_by_side(part, count, number) : timed(part, count);
    printf("compare: part %s %s %016llx %llu\n", part->kind == USER ? "user" : "system", part->name,
           (unsigned long long)found.sum, (unsigned long long)found.time);
    fflush(stdout);
}

int main(void)
{
    if (getpid() == 1) {
        /* The kernel's messages would end up in the middle of lines. */
        klogctl(6 /* SYSLOG_ACTION_CONSOLE_OFF */, NULL, 0);
    }
    uint64_t start = microseconds();
    printf("compare: start\n");
    fflush(stdout);
    const char *wanted = getenv("compare_parts");
    uint64_t divide = setting("compare_divide", 1);
    uint64_t number = setting("compare_copies", 0);
    if (number > MOST_COPIES)
        fail("compare_copies");
    int flags = MAP_SHARED | MAP_ANONYMOUS;
    copies = mmap(NULL, sizeof *copies, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (copies == MAP_FAILED)
        fail("mmap");
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (!wanted || is_in(wanted, parts[i].name))
            run(&parts[i], divide, number);
    printf("compare: end %llu\n", (unsigned long long)(microseconds() - start));
    fflush(stdout);
    if (getpid() == 1)
        switch_off();
    return 0;
}
