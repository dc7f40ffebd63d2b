/* SPDX-License-Identifier: Apache-2.0 */
/* What every program here uses: a call that fails where it must not, or does not where it must, ends it. */
#ifndef TUCKCTL_CHECK_H
#define TUCKCTL_CHECK_H

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* pytest makes a skip of this exit status. */
enum { SKIPPED = 77 };

static int64_t check_ok(int64_t value, const char *call, const char *file, int line) {
    if (value < 0) {
        fprintf(stderr, "%s:%d: %s: %s\n", file, line, call, strerror((int)-value));
        exit(1);
    }
    return value;
}

static void check_fails(int64_t value, int error, const char *call, const char *file, int line) {
    if (value != -error) {
        fprintf(stderr, "%s:%d: %s: %lld where -%d (%s) was due\n", file, line, call, (long long)value, error,
                strerror(error));
        exit(1);
    }
}

static void check_true(int value, const char *claim, const char *file, int line) {
    if (!value) {
        fprintf(stderr, "%s:%d: not so: %s\n", file, line, claim);
        exit(1);
    }
}

static int check_sys(int value, const char *call, const char *file, int line) {
    return (int)check_ok(value < 0 ? -errno : value, call, file, line);
}

/* OK for a function of the floor: a value or -errno. SYS for one of libc's: a value, or -1 and errno. */
#define OK(call) check_ok((call), #call, __FILE__, __LINE__)
#define FD(call) ((int)check_ok((call), #call, __FILE__, __LINE__))
#define SYS(call) check_sys((call), #call, __FILE__, __LINE__)
#define FAILS(call, error) check_fails((call), (error), #call, __FILE__, __LINE__)
#define TRUE(claim) check_true((claim), #claim, __FILE__, __LINE__)

#endif
