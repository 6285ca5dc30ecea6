/* Parts that are about the kernel. */
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "compare.h"

/* `getppid` past the C library; its answer differs among machines, that it stays the same not. */
uint64_t system_calls(uint64_t count)
{
    long parent = syscall(SYS_getppid);
    uint64_t same = 0;
    start_clock();
    while (count--)
        same += syscall(SYS_getppid) == parent;
    stop_clock();
    return same;
}

/* 16 MiB from the kernel, every page of it written, and back again. */
uint64_t fresh_memory(uint64_t count)
{
    enum { SIZE = 16 << 20, PAGE = 4096 };
    uint64_t sum = 0;
    start_clock();
    while (count--) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS;
        volatile uint8_t *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (memory == MAP_FAILED)
            fail("mmap");
        /* Pages one by one, whatever the machine's kernel does with huge pages. */
        madvise((void *)memory, SIZE, MADV_NOHUGEPAGE);
        for (uint64_t at = 0; at < SIZE; at += PAGE) {
            memory[at] = at / PAGE + count;
            sum = mix(sum, memory[at] + memory[at + 1]);
        }
        munmap((void *)memory, SIZE);
    }
    stop_clock();
    return sum;
}

/* A child that ends at once, `count` times. */
uint64_t processes(uint64_t count)
{
    uint64_t sum = 0;
    fflush(stdout);
    start_clock();
    for (uint64_t i = 0; i < count; i++) {
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        if (child == 0)
            _exit(i % 100);
        int status;
        if (waitpid(child, &status, 0) != child || !WIFEXITED(status))
            fail("waitpid");
        sum = mix(sum, WEXITSTATUS(status));
    }
    stop_clock();
    return sum;
}

static uint64_t receive(int from)
{
    uint64_t value;
    if (read(from, &value, sizeof value) != sizeof value)
        fail("read from a pipe");
    return value;
}

static void pass(int to, uint64_t value)
{
    if (write(to, &value, sizeof value) != sizeof value)
        fail("write to a pipe");
}

/* A number goes to another process and comes back changed, `count` times. */
uint64_t ping_pong(uint64_t count)
{
    int there[2], back[2];
    if (pipe(there) || pipe(back))
        fail("pipe");
    fflush(stdout);
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (child == 0) {
        for (uint64_t i = 0; i < count; i++)
            pass(back[1], mix(receive(there[0]), i));
        _exit(0);
    }
    uint64_t value = 1;
    start_clock();
    for (uint64_t i = 0; i < count; i++) {
        pass(there[1], value);
        value = receive(back[0]);
    }
    stop_clock();
    waitpid(child, NULL, 0);
    close(there[0]);
    close(there[1]);
    close(back[0]);
    close(back[1]);
    return value;
}
