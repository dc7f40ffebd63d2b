/* SPDX-License-Identifier: Apache-2.0 */
#include "floor.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct search {
    const uint64_t *mount_ids;
    size_t mount_count;
    const struct tuck_dev *devices;
    size_t device_count;
    struct tuck_holder *ret_holders;
    size_t count;
    int64_t found;
};

static bool sought(const struct search *search, uint64_t mount_id) {
    size_t low = 0, high = search->mount_count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (search->mount_ids[middle] < mount_id)
            low = middle + 1;
        else
            high = middle;
    }
    return low < search->mount_count && search->mount_ids[low] == mount_id;
}

static void note(struct search *search, struct tuck_holder holder) {
    if ((size_t)search->found < search->count)
        search->ret_holders[search->found] = holder;
    search->found++;
}

/* A process may end, or close what is looked at, at any moment: what is gone holds nothing. */
static void look(struct search *search, int directory, const char *name, struct tuck_holder holder) {
    if (tuck_mount_id(directory, name, 0, &holder.mount_id) == 0 && sought(search, holder.mount_id))
        note(search, holder);
}

static void look_for_watches(struct search *search, int process, const char *fd, struct tuck_holder holder) {
    char path[300], line[512], link[32];
    if (search->device_count == 0)
        return;
    snprintf(path, sizeof path, "fd/%s", fd);
    ssize_t length = readlinkat(process, path, link, sizeof link);
    if (length != 18 || memcmp(link, "anon_inode:inotify", 18) != 0)
        return;
    snprintf(path, sizeof path, "fdinfo/%s", fd);
    int info = openat(process, path, O_RDONLY | O_CLOEXEC);
    FILE *lines = info < 0 ? NULL : fdopen(info, "re");
    if (lines == NULL) {
        if (info >= 0)
            close(info);
        return;
    }
    holder.kind = TUCK_HOLD_WATCH;
    while (fgets(line, sizeof line, lines) != NULL) {
        unsigned int device;
        const char *at = strstr(line, "sdev:");
        if (strncmp(line, "inotify ", 8) != 0 || at == NULL || sscanf(at, "sdev:%x", &device) != 1)
            continue;
        /* The kernel prints its own dev_t here: twenty bits of minor. */
        for (size_t i = 0; i < search->device_count; i++)
            if (search->devices[i].major == device >> 20 && search->devices[i].minor == (device & 0xfffff)) {
                note(search, holder);
                fclose(lines);
                return;
            }
    }
    fclose(lines);
}

static bool each_descriptor(int process, struct search *search, int32_t pid) {
    int fd = openat(process, "fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT || errno == ESRCH;
    DIR *entries = fdopendir(fd);
    if (entries == NULL) {
        close(fd);
        return false;
    }
    const struct dirent *entry;
    while ((entry = readdir(entries)) != NULL) {
        struct tuck_holder holder = {.pid = pid, .kind = TUCK_HOLD_FD};
        if (entry->d_name[0] == '.')
            continue;
        holder.number = strtoull(entry->d_name, NULL, 10);
        look_for_watches(search, process, entry->d_name, holder);
        look(search, fd, entry->d_name, holder);
    }
    closedir(entries);
    return true;
}

/* A program or library is mapped piece by piece: of mappings of one file in a row, one look at the first will do. */
static bool each_mapping(int process, struct search *search, int32_t pid) {
    char *line = NULL, *before = NULL, name[64];
    size_t size = 0, size_before = 0;
    int file_before = 0;
    int maps = openat(process, "maps", O_RDONLY | O_CLOEXEC);
    if (maps < 0)
        return errno == ENOENT || errno == ESRCH;
    int folder = openat(process, "map_files", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    FILE *lines = folder < 0 ? NULL : fdopen(maps, "re");
    if (lines == NULL) {
        bool gone = folder < 0 && (errno == ENOENT || errno == ESRCH);
        if (folder >= 0)
            close(folder);
        close(maps);
        return gone;
    }
    while (getline(&line, &size, lines) > 0) {
        struct tuck_holder holder = {.pid = pid, .kind = TUCK_HOLD_MAP};
        /* What follows the inode is a path, unless the inode is 0: that is memory without a file. */
        uint64_t inode = 0;
        int file = 0;
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %*s %n%*s %" SCNu64, &holder.number, &holder.end, &file, &inode) <
                3 ||
            inode == 0)
            continue;
        if (before == NULL || strcmp(line + file, before + file_before) != 0) {
            snprintf(name, sizeof name, "%" PRIx64 "-%" PRIx64, holder.number, holder.end);
            look(search, folder, name, holder);
        }
        char *spare = before;
        size_t size_spare = size_before;
        before = line;
        size_before = size;
        file_before = file;
        line = spare;
        size = size_spare;
    }
    free(before);
    free(line);
    fclose(lines);
    close(folder);
    return true;
}

int64_t tuck_find_holders(int proc, const uint64_t *mount_ids, size_t mount_count, const struct tuck_dev *devices,
                          size_t device_count, struct tuck_holder *ret_holders, size_t count, size_t *ret_unseen) {
    struct search search = {mount_ids, mount_count, devices, device_count, ret_holders, count, 0};
    static const struct {
        const char *name;
        int kind;
    } links[] = {{"cwd", TUCK_HOLD_CWD}, {"root", TUCK_HOLD_ROOT}, {"exe", TUCK_HOLD_EXE}};
    *ret_unseen = 0;
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
        int process = openat(fd, entry->d_name, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (process < 0)
            continue;
        for (size_t i = 0; i < sizeof links / sizeof links[0]; i++)
            look(&search, process, links[i].name, (struct tuck_holder){.pid = (int32_t)pid, .kind = links[i].kind});
        bool seen = each_descriptor(process, &search, (int32_t)pid);
        if (!each_mapping(process, &search, (int32_t)pid) || !seen)
            ++*ret_unseen;
        close(process);
    }
    closedir(entries);
    return search.found;
}
