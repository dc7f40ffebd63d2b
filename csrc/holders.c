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
#include <sys/inotify.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* linux/kcmp.h */
enum { KCMP_FILES_ = 2, KCMP_FS_ = 3 };

struct search {
    int proc;
    const uint64_t *mount_ids;
    size_t mount_count;
    const struct tuck_dev *devices;
    size_t device_count;
    struct tuck_holder *ret_holders;
    size_t count;
    int64_t found;
    uint64_t anonymous; /* the mount of all files without a name, 0 where that could not be told */
    bool comparable;    /* whether the numbers in proc are those that kcmp(2) takes */
    bool barred;        /* whether something of the process at hand may not be looked at */
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

static bool of_sought_device(const struct search *search, uint32_t major, uint32_t minor) {
    for (size_t i = 0; i < search->device_count; i++)
        if (search->devices[i].major == major && search->devices[i].minor == minor)
            return true;
    return false;
}

/* A process may end, or close what is looked at, at any moment: what is gone holds nothing. What may not be
 * looked at is no such thing. */
static bool gone(int error) {
    return error == ENOENT || error == ESRCH;
}

static int look(struct search *search, int directory, const char *name, struct tuck_holder holder) {
    int error = tuck_mount_id(directory, name, 0, &holder.mount_id);
    if (error == 0 && sought(search, holder.mount_id))
        note(search, holder);
    return error;
}

static void look_for_watches(struct search *search, int process, const char *fd, struct tuck_holder holder) {
    char path[300], line[512], link[32];
    snprintf(path, sizeof path, "fd/%s", fd);
    ssize_t length = readlinkat(process, path, link, sizeof link);
    if (length != 18 || memcmp(link, "anon_inode:inotify", 18) != 0)
        return;
    snprintf(path, sizeof path, "fdinfo/%s", fd);
    int info = openat(process, path, O_RDONLY | O_CLOEXEC);
    FILE *lines = info < 0 ? NULL : fdopen(info, "re");
    if (lines == NULL) {
        search->barred |= !gone(errno);
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
        holder.device = (struct tuck_dev){device >> 20, device & 0xfffff};
        if (of_sought_device(search, holder.device.major, holder.device.minor)) {
            note(search, holder);
            break;
        }
    }
    fclose(lines);
}

static void each_descriptor(struct search *search, int process, struct tuck_holder holder) {
    int fd = openat(process, "fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *entries = fd < 0 ? NULL : fdopendir(fd);
    if (entries == NULL) {
        search->barred |= !gone(errno);
        if (fd >= 0)
            close(fd);
        return;
    }
    const struct dirent *entry;
    holder.kind = TUCK_HOLD_FD;
    while ((entry = readdir(entries)) != NULL) {
        uint64_t mount_id = 0;
        if (entry->d_name[0] == '.')
            continue;
        holder.number = strtoull(entry->d_name, NULL, 10);
        int error = tuck_mount_id(fd, entry->d_name, 0, &mount_id);
        if (error < 0) {
            search->barred |= !gone(-error);
            continue;
        }
        if (sought(search, mount_id)) {
            holder.mount_id = mount_id;
            note(search, holder);
            holder.mount_id = 0;
        } else if (search->device_count > 0 && (search->anonymous == 0 || mount_id == search->anonymous)) {
            look_for_watches(search, process, entry->d_name, holder);
        }
    }
    closedir(entries);
}

/* A program or library is mapped piece by piece: of mappings of one file in a row, one look at the first will do.
 *
 * To follow what is mapped takes rights in the first user namespace. Without, the device number tells whether it is
 * the overlay's. */
static void each_mapping(struct search *search, int process, struct tuck_holder holder) {
    char *line = NULL, *before = NULL, name[64];
    size_t size = 0, size_before = 0;
    int file_before = 0;
    int maps = openat(process, "maps", O_RDONLY | O_CLOEXEC);
    int folder = maps < 0 ? -1 : openat(process, "map_files", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    FILE *lines = folder < 0 ? NULL : fdopen(maps, "re");
    if (lines == NULL) {
        search->barred |= !gone(errno);
        if (folder >= 0)
            close(folder);
        if (maps >= 0)
            close(maps);
        return;
    }
    holder.kind = TUCK_HOLD_MAP;
    while (getline(&line, &size, lines) > 0) {
        /* What follows the inode is a path, unless the inode is 0: that is memory without a file. */
        uint64_t inode = 0;
        unsigned int major = 0, minor = 0;
        int file = 0;
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %*s %n%x:%x %" SCNu64, &holder.number, &holder.end, &file, &major,
                   &minor, &inode) < 5 ||
            inode == 0)
            continue;
        if (before == NULL || strcmp(line + file, before + file_before) != 0) {
            snprintf(name, sizeof name, "%" PRIx64 "-%" PRIx64, holder.number, holder.end);
            int error = look(search, folder, name, holder);
            if (error == -EPERM && search->device_count > 0) {
                struct tuck_holder told = holder;
                told.device = (struct tuck_dev){major, minor};
                if (of_sought_device(search, major, minor))
                    note(search, told);
            } else if (error < 0) {
                search->barred |= !gone(-error);
            }
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
}

static void look_at_links(struct search *search, int process, struct tuck_holder holder) {
    static const struct {
        const char *name;
        int kind;
    } links[] = {{"cwd", TUCK_HOLD_CWD}, {"root", TUCK_HOLD_ROOT}};
    for (size_t i = 0; i < sizeof links / sizeof links[0]; i++) {
        holder.kind = links[i].kind;
        int error = look(search, process, links[i].name, holder);
        search->barred |= error < 0 && !gone(-error);
    }
}

/* What all threads of a process have in common. */
static int look_at_memory(struct search *search, int process, struct tuck_holder holder) {
    holder.kind = TUCK_HOLD_EXE;
    int error = look(search, process, "exe", holder);
    search->barred |= error < 0 && !gone(-error);
    each_mapping(search, process, holder);
    return error;
}

static bool same(const struct search *search, int32_t one, int32_t other, int what) {
    return search->comparable && one != 0 && syscall(SYS_kcmp, one, other, what, 0, 0) == 0;
}

/* A thread may have descriptors, or a working directory and a root, of its own (CLONE_FILES, CLONE_FS: clone(2)).
 * A process lives on when its first thread has ended, which then has nothing any more. */
static void each_thread(struct search *search, int process, int32_t pid, bool first_has_memory) {
    struct stat status;
    /* Each thread is one of its links, beside the two that every directory has. */
    if (fstatat(process, "task", &status, 0) == 0 && status.st_nlink == 3)
        return;
    int fd = openat(process, "task", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *entries = fd < 0 ? NULL : fdopendir(fd);
    if (entries == NULL) {
        search->barred |= !gone(errno);
        if (fd >= 0)
            close(fd);
        return;
    }
    int32_t with_files = pid, with_links = pid;
    const struct dirent *entry;
    while ((entry = readdir(entries)) != NULL) {
        int32_t thread = (int32_t)strtol(entry->d_name, NULL, 10);
        if (thread <= 0 || thread == pid)
            continue;
        bool files = same(search, pid, thread, KCMP_FILES_) || same(search, with_files, thread, KCMP_FILES_);
        bool links = same(search, pid, thread, KCMP_FS_) || same(search, with_links, thread, KCMP_FS_);
        if (files && links && first_has_memory)
            continue;
        struct tuck_holder holder = {.pid = pid, .thread = thread};
        /* Unlike its place in task, its place in proc has map_files. */
        int one = openat(search->proc, entry->d_name, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (one < 0)
            continue;
        if (!links) {
            look_at_links(search, one, holder);
            with_links = thread;
        }
        if (!files) {
            each_descriptor(search, one, holder);
            with_files = thread;
        }
        if (!first_has_memory)
            first_has_memory = look_at_memory(search, one, holder) == 0;
        close(one);
    }
    closedir(entries);
}

static void look_at_process(struct search *search, const char *name, int32_t pid) {
    struct tuck_holder holder = {.pid = pid, .thread = pid};
    int process = openat(search->proc, name, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (process < 0)
        return;
    look_at_links(search, process, holder);
    if (!search->barred) {
        each_descriptor(search, process, holder);
        bool has_memory = look_at_memory(search, process, holder) != -ENOENT;
        each_thread(search, process, pid, has_memory);
    }
    close(process);
}

/* Whether proc shows the caller's own process namespace: there the caller has one number, and no other further down. */
static bool shows_own_processes(int proc) {
    char text[4096];
    int fd = openat(proc, "self/status", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    if (length < 0)
        return false;
    text[length] = '\0';
    const char *numbers = strstr(text, "\nNSpid:\t");
    return numbers != NULL && numbers[8 + strcspn(numbers + 8, "\t\n")] == '\n';
}

static uint64_t anonymous_mount(void) {
    uint64_t mount_id = 0;
    int fd = inotify_init1(IN_CLOEXEC);
    if (fd < 0)
        return 0;
    if (tuck_mount_id(fd, "", AT_EMPTY_PATH, &mount_id) < 0)
        mount_id = 0;
    close(fd);
    return mount_id;
}

int64_t tuck_find_holders(int proc, int32_t share, int32_t shares, const uint64_t *mount_ids, size_t mount_count,
                          const struct tuck_dev *devices, size_t device_count, struct tuck_holder *ret_holders,
                          size_t count, size_t *ret_unseen) {
    struct search search = {.mount_ids = mount_ids,
                            .mount_count = mount_count,
                            .devices = devices,
                            .device_count = device_count,
                            .ret_holders = ret_holders,
                            .count = count};
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
    search.proc = fd;
    search.comparable = shows_own_processes(fd);
    search.anonymous = device_count > 0 ? anonymous_mount() : 0;
    const struct dirent *entry;
    while ((entry = readdir(entries)) != NULL) {
        char *end;
        long pid = strtol(entry->d_name, &end, 10);
        if (*end != '\0' || pid <= 0 || pid % shares != share)
            continue;
        search.barred = false;
        look_at_process(&search, entry->d_name, (int32_t)pid);
        if (search.barred)
            ++*ret_unseen;
    }
    closedir(entries);
    return search.found;
}
