/* SPDX-License-Identifier: Apache-2.0 */
#include "floor.h"

#include <errno.h>
#include <limits.h>
#include <stdalign.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
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

static int step(int namespace_fd, unsigned long direction, struct mnt_ns_info_ *ret_info) {
    *ret_info = (struct mnt_ns_info_){.size = sizeof *ret_info};
    int fd = ioctl(namespace_fd, direction, ret_info);
    return fd < 0 ? -errno : fd;
}

int tuck_namespace_after(int namespace_fd, uint64_t *ret_id) {
    struct mnt_ns_info_ info;
    int fd = step(namespace_fd, NSFS_MNT_GET_NEXT, &info);
    *ret_id = info.mnt_ns_id;
    return fd;
}

int tuck_namespace_before(int namespace_fd, uint64_t *ret_id) {
    struct mnt_ns_info_ info;
    int fd = step(namespace_fd, NSFS_MNT_GET_PREV, &info);
    *ret_id = info.mnt_ns_id;
    return fd;
}

static int neighbour(int namespace_fd, unsigned long direction, struct tuck_namespace *ret_namespace) {
    struct mnt_ns_info_ info;
    int fd = step(namespace_fd, direction, &info);
    if (fd < 0)
        return fd;
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

static int compare(const void *left, const void *right) {
    const uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return a < b ? -1 : a > b;
}

int tuck_namespace_seek(int namespace_fd, int forwards, const uint64_t *ids, size_t count, uint64_t *ret_id) {
    int current = namespace_fd;
    for (;;) {
        struct mnt_ns_info_ info;
        int next = step(current, forwards ? NSFS_MNT_GET_NEXT : NSFS_MNT_GET_PREV, &info);
        if (current != namespace_fd)
            close(current);
        if (next < 0)
            return next;
        if (count > 0 && bsearch(&info.mnt_ns_id, ids, count, sizeof *ids, compare) != NULL) {
            *ret_id = info.mnt_ns_id;
            return next;
        }
        current = next;
    }
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

/* One look into many namespaces: what is asked, where what is found goes, and how far that got. */
struct search {
    uint64_t after;
    const struct tuck_dev *devices;
    size_t device_count;
    size_t covered_count;
    const struct tuck_match *known;
    size_t known_count;
    struct tuck_match *ret_matches;
    size_t count;
    size_t *ret_unseen;
    int64_t found;
};

static uint64_t lying_on(const struct search *search, uint64_t space, const struct tuck_statmount *mount) {
    uint64_t above = 0;
    if (!wanted(mount, search->devices, search->covered_count))
        return 0;
    return tuck_listmount(mount->mnt_id, space, search->after, &above, 1) == 1 ? above : 0;
}

/* Mounts come and go while one looks: one that is gone is none, a namespace that is gone is empty. */
static int64_t find_in(const struct tuck_namespace *space, const struct search *search) {
    enum { ALL = 512, SB_BASIC = 1, MNT_BASIC = 2 };
    uint64_t ids[ALL], after = search->after;
    int64_t found = search->found;
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
            if (!wanted(&mount, search->devices, search->device_count))
                continue;
            if ((size_t)found < search->count)
                search->ret_matches[found] = (struct tuck_match){
                    .namespace_id = space->id,
                    .namespace_inode = space->inode,
                    .mount_id = mount.mnt_id,
                    .parent_id = mount.mnt_parent_id,
                    .attributes = mount.mnt_attr,
                    .propagation = mount.mnt_propagation,
                    .peer_group = mount.mnt_peer_group,
                    .master = mount.mnt_master,
                    .owner = space->owner,
                    .above = lying_on(search, space->id, &mount),
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
    struct search search = {.after = after,
                            .devices = devices,
                            .device_count = device_count,
                            .covered_count = device_count,
                            .ret_matches = ret_matches,
                            .count = count};
    *ret_unseen = 0;
    for (size_t i = 0; i < namespace_count; i++) {
        int64_t now = find_in(&namespaces[i], &search);
        if (now < 0)
            ++*ret_unseen;
        else
            search.found = now;
    }
    return search.found;
}

/* What an earlier look told of a namespace stays true. It went the same way: what is sought is near where one was. */
static bool recall(struct search *search, struct tuck_namespace *space) {
    enum { NEAR = 64 };
    for (size_t i = 0; i < NEAR && i < search->known_count; i++)
        if (search->known[i].namespace_id == space->id) {
            space->inode = search->known[i].namespace_inode;
            space->owner = search->known[i].owner;
            search->known += i;
            search->known_count -= i;
            return true;
        }
    return false;
}

/* Most namespaces on a machine have none of the mounts: whose one is, is asked where it has. */
static int search_in(struct search *search, int namespace_fd, const struct mnt_ns_info_ *info) {
    struct tuck_namespace space = {.id = info->mnt_ns_id};
    int64_t now = find_in(&space, search);
    if (now < 0) {
        ++*search->ret_unseen;
        return 0;
    }
    if (now > search->found && !recall(search, &space)) {
        int error = describe(namespace_fd, info, &space);
        if (error < 0)
            return error;
    }
    for (int64_t i = search->found; i < now && (size_t)i < search->count; i++) {
        search->ret_matches[i].namespace_inode = space.inode;
        search->ret_matches[i].owner = space.owner;
    }
    search->found = now;
    return 0;
}

static int search_towards(struct search *search, int namespace_fd, unsigned long direction) {
    int current = namespace_fd;
    for (;;) {
        struct mnt_ns_info_ info;
        int next = step(current, direction, &info);
        if (current != namespace_fd)
            close(current);
        if (next < 0)
            return next == -ENOENT ? 0 : next;
        int error = search_in(search, next, &info);
        if (error < 0) {
            close(next);
            return error;
        }
        current = next;
    }
}

int64_t tuck_find_everywhere(int namespace_fd, uint64_t after, const struct tuck_dev *devices, size_t device_count,
                             size_t covered_count, const struct tuck_match *known, size_t known_count,
                             struct tuck_match *ret_matches, size_t count, size_t *ret_unseen) {
    struct mnt_ns_info_ own = {.size = sizeof own};
    struct search search = {.after = after,
                            .devices = devices,
                            .device_count = device_count,
                            .covered_count = covered_count,
                            .known = known,
                            .known_count = known_count,
                            .ret_matches = ret_matches,
                            .count = count,
                            .ret_unseen = ret_unseen};
    *ret_unseen = 0;
    if (ioctl(namespace_fd, NSFS_MNT_GET_INFO, &own) < 0)
        return -errno;
    int error = search_in(&search, namespace_fd, &own);
    if (error == 0)
        error = search_towards(&search, namespace_fd, NSFS_MNT_GET_PREV);
    if (error == 0)
        error = search_towards(&search, namespace_fd, NSFS_MNT_GET_NEXT);
    return error < 0 ? error : search.found;
}

int64_t tuck_statmount_each(struct tuck_facts *mounts, size_t count, uint64_t mask, uint64_t after, char *ret_text,
                            size_t size) {
    size_t used = 0;
    for (size_t i = 0; i < count; i++) {
        struct tuck_facts *one = &mounts[i];
        if (size - used < sizeof(struct tuck_statmount))
            return (int64_t)i;
        struct tuck_statmount *mount = (struct tuck_statmount *)(void *)(ret_text + used);
        one->above = 0;
        one->offset = (uint32_t)used;
        one->error = tuck_statmount(one->mount_id, one->namespace_id, mask, mount, size - used);
        if (one->error == -EOVERFLOW)
            return (int64_t)i;
        if (one->error < 0)
            continue;
        int64_t listed = tuck_listmount(one->mount_id, one->namespace_id, after, &one->above, 1);
        if (listed < 0)
            one->error = (int32_t)listed;
        size_t next = used + mount->size;
        next += -next % alignof(struct tuck_statmount);
        used = next < size ? next : size;
    }
    return (int64_t)count;
}

/* A mount with its place. */
union placed {
    struct tuck_statmount mount;
    char room[sizeof(struct tuck_statmount) + PATH_MAX];
};

static const char *place_of(uint64_t mount_id, uint64_t namespace_id, union placed *ret_placed) {
    enum { MNT_BASIC = 2, MNT_POINT = 16 };
    if (tuck_statmount(mount_id, namespace_id, MNT_BASIC | MNT_POINT, &ret_placed->mount, sizeof *ret_placed) < 0)
        return NULL;
    return ret_placed->mount.str + ret_placed->mount.mnt_point;
}

/* The way up from a mount: each one lies on the next, at a place that is so long a piece of the first one's. */
struct way {
    char path[PATH_MAX];
    size_t count;
    struct {
        uint64_t on;
        size_t length;
    } steps[128];
};

static int go_up(uint64_t mount_id, uint64_t namespace_id, struct way *ret_way) {
    union placed placed;
    const char *place = place_of(mount_id, namespace_id, &placed);
    if (place == NULL)
        return -ENOENT;
    memcpy(ret_way->path, place, strlen(place) + 1);
    ret_way->count = 0;
    while (ret_way->count < sizeof ret_way->steps / sizeof ret_way->steps[0]) {
        const uint64_t id = placed.mount.mnt_id, on = placed.mount.mnt_parent_id;
        const size_t length = strlen(place);
        /* Above the root of its namespace, or of what the caller may see, there is nothing. */
        if (on == id || (place = place_of(on, namespace_id, &placed)) == NULL)
            break;
        ret_way->steps[ret_way->count].on = on;
        ret_way->steps[ret_way->count++].length = length;
    }
    return 0;
}

/* Whether the way leads through this place, and over it before it comes to the end of a step. */
static bool leads_over(const struct way *way, size_t step, const char *place) {
    const size_t length = strlen(place), prefix = length > 1 ? length : 0;
    return length < way->steps[step].length && strncmp(way->path, place, prefix) == 0 && way->path[prefix] == '/';
}

int64_t tuck_cover_above(uint64_t mount_id, uint64_t namespace_id, char *ret_point, size_t size) {
    enum { ALL = 512 };
    struct way way;
    uint64_t ids[ALL], after = 0;
    size_t found = 0;
    int64_t listed;
    int error = go_up(mount_id, namespace_id, &way);
    if (error < 0)
        return error;
    do {
        listed = tuck_listmount(UINT64_MAX, namespace_id, after, ids, ALL);
        if (listed < 0)
            return listed;
        for (int64_t i = 0; i < listed; i++) {
            union placed placed;
            const char *place = place_of(ids[i], namespace_id, &placed);
            after = ids[i];
            for (size_t step = 0; place != NULL && step < way.count; step++) {
                if (way.steps[step].on != placed.mount.mnt_parent_id || !leads_over(&way, step, place))
                    continue;
                way.count = step; /* what is nearer is sought still */
                found = strlen(place);
                memcpy(ret_point, place, found < size ? found : size);
            }
        }
    } while (listed == ALL);
    return (int64_t)found;
}
