/* SPDX-License-Identifier: Apache-2.0 */
/* turns NAMESPACE READY PATH...: reads the number in each path in turn until SIGTERM, over and over, in the namespace
 * of an nsfs file. Prints how many it read, how often it could not, how often a number was lower than one before it in
 * the same pass, and how often it was lower than the highest so far. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static volatile sig_atomic_t stopped;

static void stop(int signal) {
    (void)signal;
    stopped = 1;
}

static long number(const char *path) {
    char text[32];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    if (length <= 0)
        return -1;
    text[length] = '\0';
    char *end;
    long found = strtol(text, &end, 10);
    return end == text ? -1 : found;
}

int main(int count, char **arguments) {
    struct sigaction action = {.sa_handler = stop};
    unsigned long reads = 0, wrong = 0, in_a_pass = 0, ever = 0;
    long highest = 0;
    if (count < 4)
        return 2;
    int space = open(arguments[1], O_RDONLY | O_CLOEXEC), ready = atoi(arguments[2]);
    if (space < 0 || setns(space, CLONE_NEWNS) < 0 || sigaction(SIGTERM, &action, NULL) < 0)
        return 3;
    for (long first = 1; !stopped; first = 0) {
        long before = 0;
        for (int i = 3; i < count; i++) {
            long found = number(arguments[i]);
            reads++;
            wrong += found < 0;
            if (found < 0)
                continue;
            in_a_pass += found < before;
            ever += found < highest;
            before = found > before ? found : before;
            highest = found > highest ? found : highest;
        }
        usleep(100); /* several of them share few processors with what they watch */
        if (first && write(ready, ".", 1) < 0)
            return 4;
    }
    printf("%lu %lu %lu %lu\n", reads, wrong, in_a_pass, ever);
    return 0;
}
