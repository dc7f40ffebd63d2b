/* SPDX-License-Identifier: Apache-2.0 */
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

enum {
    EMPTY_PATH_ = 0x1000,
    RESOLVE_NO_SYMLINKS_ = 0x4,
    RESOLVE_CACHED_ = 0x20,
    MOVE_F_EMPTY_PATH = 0x4,
    MOVE_T_EMPTY_PATH = 0x40,
    MOVE_BENEATH = 0x200,
    CLONE_TREE = 1,
    SB_BASIC = 1,
    MNT_BASIC = 2,
};

/* The walk asks no filesystem for what the kernel does not have in its memory: it cannot hang. It fails in the same
 * way where someone mounts something, anywhere, while it goes on. */
static int walk(int directory, const char *path) {
    enum { TRIES = 16 };
    int fd = -EAGAIN;
    for (int i = 0; i < TRIES && fd == -EAGAIN; i++)
        fd = tuck_openat2(directory, path, O_PATH | O_CLOEXEC, 0, RESOLVE_NO_SYMLINKS_ | RESOLVE_CACHED_);
    return fd;
}

static int reach(const struct tuck_replacement *wanted, int directory, const char *path) {
    uint64_t found;
    int fd = walk(directory, path);
    if (fd < 0)
        return fd;
    int error = tuck_mount_id(fd, "", EMPTY_PATH_, &found);
    if (error == 0 && found != wanted->mount_id)
        error = -ESTALE;
    if (error < 0) {
        close(fd);
        return error;
    }
    return fd;
}

static int refuse_others(const struct tuck_replacement *wanted) {
    struct tuck_statmount mount, parent;
    uint64_t above;
    int error = tuck_statmount(wanted->mount_id, 0, MNT_BASIC, &mount, sizeof mount);
    if (error == 0)
        error = tuck_statmount(wanted->parent_id, 0, SB_BASIC | MNT_BASIC, &parent, sizeof parent);
    if (error < 0)
        return error;
    if (mount.mnt_parent_id != wanted->parent_id || parent.mnt_peer_group != 0)
        return -ESTALE;
    if (parent.sb_dev_major == wanted->device.major && parent.sb_dev_minor == wanted->device.minor)
        return -EEXIST;
    int64_t count = tuck_listmount(wanted->mount_id, 0, 0, &above, 1);
    return count < 0 ? (int)count : count > 0 ? -EBUSY : 0;
}

static int put_beneath(struct tuck_replacement *wanted) {
    int error = tuck_setns(wanted->space, CLONE_NEWNS);
    if (error < 0)
        return error;
    int seen = reach(wanted, AT_FDCWD, wanted->point);
    if (seen < 0)
        return seen;
    error = refuse_others(wanted);
    if (error == 0)
        error = tuck_move_mount(wanted->clone, "", seen, "", MOVE_F_EMPTY_PATH | MOVE_T_EMPTY_PATH | MOVE_BENEATH);
    wanted->placed = error == 0;
    close(seen);
    return error;
}

/* No more than the last name is looked up again, in a directory that is open: nobody can put anything in the way. */
static int unmount(const struct tuck_replacement *wanted) {
    char folder[PATH_MAX];
    const char *slash = strrchr(wanted->point, '/');
    if (slash == NULL || slash[1] == '\0')
        return -EINVAL; /* the root */
    size_t length = (size_t)(slash - wanted->point) + 1;
    if (length >= sizeof folder)
        return -ENAMETOOLONG;
    memcpy(folder, wanted->point, length);
    folder[length] = '\0';
    int around = walk(AT_FDCWD, folder);
    if (around < 0)
        return around;
    int seen = reach(wanted, around, slash + 1);
    int error = seen < 0 ? seen : fchdir(around) < 0 ? -errno : 0;
    close(around);
    if (seen >= 0)
        close(seen);
    return error < 0 ? error : tuck_umount2(slash + 1, UMOUNT_NOFOLLOW);
}

static int take_off(const struct tuck_replacement *wanted) {
    struct tuck_statmount mount;
    int error = unmount(wanted);
    if (error < 0)
        return error;
    return tuck_statmount(wanted->mount_id, 0, MNT_BASIC, &mount, sizeof mount) == -ENOENT ? 0 : -ESTALE;
}

static void replace(struct tuck_replacement *one) {
    one->placed = 0;
    one->error = put_beneath(one);
    if (one->error == 0)
        one->error = take_off(one);
}

void tuck_replace(struct tuck_replacement *replacements, size_t count) {
    for (size_t i = 0; i < count; i++)
        replace(&replacements[i]);
}

/* The clone is of home, and can be made there only. */
static int make_clone(int home, int source, struct tuck_replacement *one) {
    int error = tuck_setns(home, CLONE_NEWNS);
    if (error < 0)
        return error;
    int clone = tuck_open_tree_attr(source, "", CLONE_TREE | O_CLOEXEC | EMPTY_PATH_, 0, 0, MS_PRIVATE, 0);
    if (clone < 0)
        return clone;
    one->clone = clone;
    return tuck_mount_id(clone, "", EMPTY_PATH_, &one->clone_id);
}

static void replace_by_clone(int home, int source, int space, struct tuck_replacement *one) {
    one->space = space;
    one->error = make_clone(home, source, one);
    if (one->error == 0)
        replace(one);
    one->space = -1;
    if (one->clone >= 0 && (one->error == 0 || !one->placed)) {
        close(one->clone);
        one->clone = -1;
    }
}

struct search {
    int home;
    int source;
    struct tuck_replacement *replacements;
    size_t count;
};

static void replace_in(const struct search *search, int space, uint64_t id) {
    size_t low = 0, high = search->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (search->replacements[middle].namespace_id < id)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < search->count && search->replacements[low].namespace_id == id; low++)
        replace_by_clone(search->home, search->source, space, &search->replacements[low]);
}

static int replace_towards(const struct search *search, int (*step)(int, uint64_t *)) {
    int current = search->home;
    for (;;) {
        uint64_t id;
        int next = step(current, &id);
        if (current != search->home)
            close(current);
        if (next < 0)
            return next == -ENOENT ? 0 : next;
        replace_in(search, next, id);
        current = next;
    }
}

int tuck_replace_everywhere(int home, int source, struct tuck_replacement *replacements, size_t count) {
    const struct search search = {home, source, replacements, count};
    uint64_t own;
    int left, error = tuck_namespace_id(home, &own);
    if (error < 0)
        return error;
    for (size_t i = 0; i < count; i++) {
        replacements[i].space = replacements[i].clone = -1;
        replacements[i].placed = 0;
        replacements[i].error = -ESRCH;
    }
    replace_in(&search, home, own);
    error = replace_towards(&search, tuck_namespace_after);
    if (error == 0)
        error = replace_towards(&search, tuck_namespace_before);
    left = tuck_setns(home, CLONE_NEWNS);
    return error < 0 ? error : left;
}

int tuck_umount_each(const char *const *paths, const int *flags, size_t count, size_t *ret_done) {
    for (*ret_done = 0; *ret_done < count; (*ret_done)++) {
        int error = tuck_umount2(paths[*ret_done], flags[*ret_done]);
        if (error < 0)
            return error;
    }
    return 0;
}
