/* SPDX-License-Identifier: Apache-2.0 */
#include "floor.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static uint64_t mount_namespace_of(int proc, int32_t pid) {
    char path[32], link[64];
    uint64_t inode;
    snprintf(path, sizeof path, "%" PRId32 "/ns/mnt", pid);
    ssize_t length = readlinkat(proc, path, link, sizeof link - 1);
    if (length < 0)
        return 0;
    link[length] = '\0';
    return sscanf(link, "mnt:[%" SCNu64 "]", &inode) == 1 ? inode : 0;
}

int64_t tuck_list_processes(int proc, struct tuck_process *ret_processes, size_t count) {
    int64_t found = 0;
    int fd = openat(proc, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    DIR *entries = fdopendir(fd);
    if (entries == NULL) {
        int error = errno;
        close(fd);
        return -error;
    }
    const struct dirent *entry;
    while ((entry = readdir(entries)) != NULL) {
        char *end;
        long pid = strtol(entry->d_name, &end, 10);
        if (*end != '\0' || pid <= 0)
            continue;
        struct tuck_process process = {.pid = (int32_t)pid, .mount_namespace = mount_namespace_of(fd, (int32_t)pid)};
        /* It may end at any moment, or not be looked into. */
        if (process.mount_namespace == 0)
            continue;
        if ((size_t)found < count)
            ret_processes[found] = process;
        found++;
    }
    closedir(entries);
    return found;
}

/* Reads a small file of /proc: as far as there is room, one read tells all of it. */
static size_t read_file(int directory, const char *path, char *ret_text, size_t size) {
    int fd = openat(directory, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t length = read(fd, ret_text, size);
    close(fd);
    return length < 0 ? 0 : (size_t)length;
}

int64_t tuck_read_each(int proc, const int32_t *pids, size_t count, const char *name, char *ret_text, size_t size,
                       size_t *ret_ends) {
    size_t used = 0;
    for (size_t i = 0; i < count; i++) {
        char path[64];
        int length = snprintf(path, sizeof path, "%" PRId32 "/%s", pids[i], name);
        if (length < 0 || (size_t)length >= sizeof path)
            return -ENAMETOOLONG;
        used += read_file(proc, path, ret_text + used, size - used);
        if (used == size)
            return (int64_t)i; /* it may have been cut */
        ret_ends[i] = used;
    }
    return (int64_t)count;
}
