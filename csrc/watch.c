/* SPDX-License-Identifier: Apache-2.0 */
#include "floor.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Each look writes what it saw as text, or returns -errno. */

static int look_read(const char *path, char *ret_text, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t length = read(fd, ret_text, size - 1);
    int error = length < 0 ? -errno : 0;
    close(fd);
    if (error == 0)
        ret_text[length] = '\0';
    return error;
}

static int look_stat(const char *path, char *ret_text, size_t size) {
    struct stat status;
    if (stat(path, &status) < 0)
        return -errno;
    snprintf(ret_text, size, "%lld", (long long)status.st_size);
    return 0;
}

static int by_name(const void *left, const void *right) {
    return strcmp(*(char *const *)left, *(char *const *)right);
}

/* The names in order, a space between them. */
static int look_readdir(const char *path, char *ret_text, size_t size) {
    enum { MOST = 64 };
    char *names[MOST];
    size_t count = 0, used = 0;
    DIR *entries = opendir(path);
    if (entries == NULL)
        return -errno;
    for (;;) {
        errno = 0;
        const struct dirent *entry = readdir(entries);
        if (entry == NULL)
            break;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0 || count == MOST)
            continue;
        names[count] = strdup(entry->d_name);
        if (names[count] != NULL)
            count++;
    }
    int error = -errno;
    closedir(entries);
    qsort(names, count, sizeof names[0], by_name);
    ret_text[0] = '\0';
    for (size_t i = 0; i < count; i++) {
        int more = snprintf(ret_text + used, size - used, i > 0 ? " %s" : "%s", names[i]);
        if (more > 0 && (size_t)more < size - used)
            used += (size_t)more;
        free(names[i]);
    }
    return error;
}

static int look_execve(const char *path, char *ret_text, size_t size) {
    pid_t child;
    int status;
    char *const arguments[] = {(char *)"look", NULL};
    char *const environment[] = {NULL};
    int error = posix_spawn(&child, path, NULL, NULL, arguments, environment);
    if (error != 0)
        return -error;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            return -errno;
    snprintf(ret_text, size, "%d", WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status));
    return 0;
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int tuck_watch(int how, const char *path, const char *const *expected, size_t expected_count, uint32_t good,
               struct tuck_counts *counts) {
    static int (*const looks[])(const char *, char *, size_t) = {look_read, look_stat, look_readdir, look_execve};
    char text[1024];
    uint64_t absent_since = 0;
    if (how < 0 || (size_t)how >= sizeof looks / sizeof looks[0] || expected_count > 8)
        return -EINVAL;
    while (__atomic_load_n(&counts->stop, __ATOMIC_ACQUIRE) == 0) {
        int error = looks[how](path, text, sizeof text);
        size_t match = 0;
        counts->looks++;
        if (error < 0) {
            counts->errors++;
            counts->last_errno = (uint64_t)-error;
            match = expected_count;
        } else {
            while (match < expected_count && strcmp(text, expected[match]) != 0)
                match++;
            if (match < expected_count) {
                counts->seen[match]++;
            } else {
                if (counts->other++ == 0)
                    snprintf(counts->sample, sizeof counts->sample, "%.*s", (int)sizeof counts->sample - 1, text);
            }
        }
        if (match < expected_count && (good >> match & 1u) != 0) {
            if (absent_since != 0) {
                uint64_t absence = now_ns() - absent_since;
                if (absence > counts->longest_absence_ns)
                    counts->longest_absence_ns = absence;
                absent_since = 0;
            }
        } else if (absent_since == 0) {
            absent_since = now_ns();
        }
        __atomic_store_n(&counts->ready, 1, __ATOMIC_RELEASE);
        uint32_t pause = __atomic_load_n(&counts->pause_us, __ATOMIC_RELAXED);
        if (pause > 0)
            usleep(pause);
    }
    return 0;
}

int tuck_end_with_parent(int signal) {
    return prctl(PR_SET_PDEATHSIG, signal) < 0 ? -errno : 0;
}
