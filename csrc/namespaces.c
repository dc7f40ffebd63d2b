/* SPDX-License-Identifier: Apache-2.0 */
#include "floor.h"

#include <errno.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

struct mnt_ns_info_ {
    uint32_t size;
    uint32_t nr_mounts;
    uint64_t mnt_ns_id;
};

/* linux/nsfs.h, spelled out: headers from before 6.12 lack the last three. */
#define NSFS_GET_USERNS _IO(0xb7, 0x1)
#define NSFS_GET_MNTNS_ID _IOR(0xb7, 0x5, uint64_t)
#define NSFS_MNT_GET_INFO _IOR(0xb7, 10, struct mnt_ns_info_)
#define NSFS_MNT_GET_NEXT _IOR(0xb7, 11, struct mnt_ns_info_)
#define NSFS_MNT_GET_PREV _IOR(0xb7, 12, struct mnt_ns_info_)

static int describe(int fd, const struct mnt_ns_info_ *info, struct tuck_namespace *ret_namespace) {
    struct stat status, owner = {.st_ino = 0};
    if (fstat(fd, &status) < 0)
        return -errno;
    int user_namespace = ioctl(fd, NSFS_GET_USERNS);
    if (user_namespace >= 0) {
        if (fstat(user_namespace, &owner) < 0)
            owner.st_ino = 0;
        close(user_namespace);
    }
    *ret_namespace = (struct tuck_namespace){
        .id = info->mnt_ns_id, .inode = status.st_ino, .mounts = info->nr_mounts, .owner = owner.st_ino};
    return 0;
}

static int neighbour(int namespace_fd, unsigned long direction, struct tuck_namespace *ret_namespace) {
    struct mnt_ns_info_ info = {.size = sizeof info};
    int fd = ioctl(namespace_fd, direction, &info);
    if (fd < 0)
        return -errno;
    int error = describe(fd, &info, ret_namespace);
    if (error < 0) {
        close(fd);
        return error;
    }
    return fd;
}

int tuck_namespace_id(int namespace_fd, uint64_t *ret_id) {
    return ioctl(namespace_fd, NSFS_GET_MNTNS_ID, ret_id) < 0 ? -errno : 0;
}

int tuck_namespace_info(int namespace_fd, struct tuck_namespace *ret_namespace) {
    struct mnt_ns_info_ info = {.size = sizeof info};
    if (ioctl(namespace_fd, NSFS_MNT_GET_INFO, &info) < 0)
        return -errno;
    return describe(namespace_fd, &info, ret_namespace);
}

int tuck_namespace_next(int namespace_fd, struct tuck_namespace *ret_namespace) {
    return neighbour(namespace_fd, NSFS_MNT_GET_NEXT, ret_namespace);
}

int tuck_namespace_previous(int namespace_fd, struct tuck_namespace *ret_namespace) {
    return neighbour(namespace_fd, NSFS_MNT_GET_PREV, ret_namespace);
}

int tuck_namespace_owner(int namespace_fd) {
    int fd = ioctl(namespace_fd, NSFS_GET_USERNS);
    return fd < 0 ? -errno : fd;
}

static int64_t list_towards(int namespace_fd, unsigned long direction, struct tuck_namespace *ret_namespaces,
                            size_t count, int64_t found) {
    int current = namespace_fd;
    for (;;) {
        struct tuck_namespace seen;
        int next = neighbour(current, direction, &seen);
        if (current != namespace_fd)
            close(current);
        if (next == -ENOENT)
            return found;
        if (next < 0)
            return next;
        if ((size_t)found < count)
            ret_namespaces[found] = seen;
        found++;
        current = next;
    }
}

int64_t tuck_list_namespaces(int namespace_fd, struct tuck_namespace *ret_namespaces, size_t count) {
    struct tuck_namespace own;
    int error = tuck_namespace_info(namespace_fd, &own);
    if (error < 0)
        return error;
    if (count > 0)
        ret_namespaces[0] = own;
    int64_t found = list_towards(namespace_fd, NSFS_MNT_GET_PREV, ret_namespaces, count, 1);
    return found < 0 ? found : list_towards(namespace_fd, NSFS_MNT_GET_NEXT, ret_namespaces, count, found);
}

static bool wanted(const struct tuck_statmount *mount, const struct tuck_dev *devices, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (devices[i].major == mount->sb_dev_major && devices[i].minor == mount->sb_dev_minor)
            return true;
    return false;
}

/* Mounts come and go while one looks: one that is gone is none, a namespace that is gone is empty. */
static int64_t find_in(const struct tuck_namespace *space, uint64_t after, const struct tuck_dev *devices,
                       size_t device_count, struct tuck_match *ret_matches, size_t count, int64_t found) {
    enum { ALL = 512, SB_BASIC = 1, MNT_BASIC = 2 };
    uint64_t ids[ALL];
    for (;;) {
        struct tuck_statmount mount;
        int64_t listed = tuck_listmount(UINT64_MAX, space->id, after, ids, ALL);
        /* To a caller without the right to look, listmount says ENOENT as well; statmount says EPERM. */
        if (listed == -ENOENT)
            return tuck_statmount(UINT64_MAX, space->id, MNT_BASIC, &mount, sizeof mount) == -EPERM ? -EPERM : found;
        if (listed < 0)
            return listed;
        for (int64_t i = 0; i < listed; i++) {
            int error = tuck_statmount(ids[i], space->id, SB_BASIC | MNT_BASIC, &mount, sizeof mount);
            if (error == -ENOENT)
                continue;
            if (error < 0)
                return error;
            if (!wanted(&mount, devices, device_count))
                continue;
            if ((size_t)found < count)
                ret_matches[found] = (struct tuck_match){
                    .namespace_id = space->id,
                    .namespace_inode = space->inode,
                    .mount_id = mount.mnt_id,
                    .parent_id = mount.mnt_parent_id,
                    .attributes = mount.mnt_attr,
                    .propagation = mount.mnt_propagation,
                    .peer_group = mount.mnt_peer_group,
                    .master = mount.mnt_master,
                    .device = {mount.sb_dev_major, mount.sb_dev_minor},
                };
            found++;
        }
        if (listed < ALL)
            return found;
        after = ids[listed - 1];
    }
}

int64_t tuck_find_mounts(const struct tuck_namespace *namespaces, size_t namespace_count, uint64_t after,
                         const struct tuck_dev *devices, size_t device_count, struct tuck_match *ret_matches,
                         size_t count, size_t *ret_unseen) {
    int64_t found = 0;
    *ret_unseen = 0;
    for (size_t i = 0; i < namespace_count; i++) {
        int64_t now = find_in(&namespaces[i], after, devices, device_count, ret_matches, count, found);
        if (now < 0)
            ++*ret_unseen;
        else
            found = now;
    }
    return found;
}
