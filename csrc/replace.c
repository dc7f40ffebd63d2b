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
    SB_BASIC = 1,
    MNT_BASIC = 2,
};

/* The walk asks no filesystem for what the kernel does not have in its memory: it cannot hang. */
static int walk(int directory, const char *path) {
    return tuck_openat2(directory, path, O_PATH | O_CLOEXEC, 0, RESOLVE_NO_SYMLINKS_ | RESOLVE_CACHED_);
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

void tuck_replace(struct tuck_replacement *replacements, size_t count) {
    for (size_t i = 0; i < count; i++) {
        struct tuck_replacement *one = &replacements[i];
        one->placed = 0;
        one->error = put_beneath(one);
        if (one->error == 0)
            one->error = take_off(one);
    }
}

int tuck_umount_each(const char *const *paths, const int *flags, size_t count, size_t *ret_done) {
    for (*ret_done = 0; *ret_done < count; (*ret_done)++) {
        int error = tuck_umount2(paths[*ret_done], flags[*ret_done]);
        if (error < 0)
            return error;
    }
    return 0;
}
