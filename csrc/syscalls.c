/* SPDX-License-Identifier: Apache-2.0 */
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

/* From open_tree on, the numbers are the same on every architecture that has the generic table
 * from its start or the unified one since 5.0; alpha, the exception, is not supported. */
#if !defined(__x86_64__) && !defined(__aarch64__) && !(defined(__riscv) && __riscv_xlen == 64)
#error "syscall numbers are known for x86-64, arm64 and riscv64"
#endif

enum {
    NR_open_tree = 428,
    NR_move_mount = 429,
    NR_fsopen = 430,
    NR_fsconfig = 431,
    NR_fsmount = 432,
    NR_fspick = 433,
    NR_openat2 = 437,
    NR_mount_setattr = 442,
    NR_statmount = 457,
    NR_listmount = 458,
    NR_open_tree_attr = 467,
};

enum {
    FSCONFIG_SET_FLAG_ = 0,
    FSCONFIG_SET_STRING_ = 1,
    FSCONFIG_SET_FD_ = 5,
    FSCONFIG_CMD_CREATE_ = 6,
    FSCONFIG_CMD_RECONFIGURE_ = 7,
};

struct mount_attributes {
    uint64_t set;
    uint64_t clear;
    uint64_t propagation;
    uint64_t user_namespace;
};

struct mount_request {
    uint32_t size;
    uint32_t spare;
    uint64_t mount_id;
    uint64_t parameter;
    uint64_t namespace_id;
};

struct open_how_ {
    uint64_t flags;
    uint64_t mode;
    uint64_t resolve;
};

static inline int result(long value) {
    return value < 0 ? -errno : (int)value;
}

int tuck_fsopen(const char *fstype, unsigned int flags) {
    return result(syscall(NR_fsopen, fstype, flags));
}

int tuck_fsconfig_set_flag(int context, const char *key) {
    return result(syscall(NR_fsconfig, context, FSCONFIG_SET_FLAG_, key, NULL, 0));
}

int tuck_fsconfig_set_string(int context, const char *key, const char *value) {
    return result(syscall(NR_fsconfig, context, FSCONFIG_SET_STRING_, key, value, 0));
}

int tuck_fsconfig_set_fd(int context, const char *key, int value) {
    return result(syscall(NR_fsconfig, context, FSCONFIG_SET_FD_, key, NULL, value));
}

int tuck_fsconfig_create(int context) {
    return result(syscall(NR_fsconfig, context, FSCONFIG_CMD_CREATE_, NULL, NULL, 0));
}

int tuck_fsconfig_reconfigure(int context) {
    return result(syscall(NR_fsconfig, context, FSCONFIG_CMD_RECONFIGURE_, NULL, NULL, 0));
}

int64_t tuck_fscontext_message(int context, char *ret_message, size_t size) {
    ssize_t length = read(context, ret_message, size);
    return length < 0 ? -errno : length;
}

int tuck_fsmount(int context, unsigned int flags, unsigned int attributes) {
    return result(syscall(NR_fsmount, context, flags, attributes));
}

int tuck_fspick(int directory, const char *path, unsigned int flags) {
    return result(syscall(NR_fspick, directory, path, flags));
}

int tuck_open_tree(int directory, const char *path, unsigned int flags) {
    return result(syscall(NR_open_tree, directory, path, flags));
}

int tuck_open_tree_attr(int directory, const char *path, unsigned int flags, uint64_t set, uint64_t clear,
                        uint64_t propagation, uint64_t user_namespace) {
    struct mount_attributes attributes = {set, clear, propagation, user_namespace};
    return result(syscall(NR_open_tree_attr, directory, path, flags, &attributes, sizeof attributes));
}

int tuck_move_mount(int from_directory, const char *from_path, int to_directory, const char *to_path,
                    unsigned int flags) {
    return result(syscall(NR_move_mount, from_directory, from_path, to_directory, to_path, flags));
}

int tuck_mount_setattr(int directory, const char *path, unsigned int flags, uint64_t set, uint64_t clear,
                       uint64_t propagation, uint64_t user_namespace) {
    struct mount_attributes attributes = {set, clear, propagation, user_namespace};
    return result(syscall(NR_mount_setattr, directory, path, flags, &attributes, sizeof attributes));
}

int tuck_umount2(const char *path, int flags) {
    return result(umount2(path, flags));
}

int tuck_pivot_root(const char *new_root, const char *put_old) {
    return result(syscall(SYS_pivot_root, new_root, put_old));
}

int tuck_statmount(uint64_t mount_id, uint64_t namespace_id, uint64_t mask, struct tuck_statmount *ret_mount,
                   size_t size) {
    struct mount_request request = {
        .size = sizeof request, .mount_id = mount_id, .parameter = mask, .namespace_id = namespace_id};
    _Static_assert(offsetof(struct tuck_statmount, str) == 512, "the kernel's layout");
    return result(syscall(NR_statmount, &request, ret_mount, size, 0));
}

int64_t tuck_listmount(uint64_t mount_id, uint64_t namespace_id, uint64_t after, uint64_t *ret_ids, size_t count) {
    struct mount_request request = {
        .size = sizeof request, .mount_id = mount_id, .parameter = after, .namespace_id = namespace_id};
    long found = syscall(NR_listmount, &request, ret_ids, count, 0);
    return found < 0 ? -errno : found;
}

/* struct statx as the kernel lays it out; libc's may lack stx_mnt_id. */
struct statx_ {
    uint32_t mask;
    uint32_t before_mount_id[35];
    uint64_t mount_id;
    uint64_t after_mount_id[13];
};

int tuck_mount_id(int directory, const char *path, int flags, uint64_t *ret_id) {
    enum { STATX_MNT_ID_UNIQUE_ = 0x4000, AT_NO_AUTOMOUNT_ = 0x800, AT_STATX_DONT_SYNC_ = 0x4000 };
    struct statx_ found;
    _Static_assert(offsetof(struct statx_, mount_id) == 144, "the kernel's layout");
    _Static_assert(sizeof(struct statx_) == 256, "the kernel's layout");
    if (syscall(SYS_statx, directory, path, flags | AT_NO_AUTOMOUNT_ | AT_STATX_DONT_SYNC_, STATX_MNT_ID_UNIQUE_,
                &found) < 0)
        return -errno;
    if ((found.mask & STATX_MNT_ID_UNIQUE_) == 0)
        return -EOPNOTSUPP;
    *ret_id = found.mount_id;
    return 0;
}

int tuck_openat2(int directory, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve) {
    struct open_how_ how = {flags, mode, resolve};
    return result(syscall(NR_openat2, directory, path, &how, sizeof how));
}

int tuck_setns(int namespace_fd, int type) {
    return result(setns(namespace_fd, type));
}

int tuck_unshare(int flags) {
    return result(unshare(flags));
}
