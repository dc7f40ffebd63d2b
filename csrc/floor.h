/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernel floor: one function, one thing done to the kernel. Each returns a value or -errno,
 * keeps no state and prints nothing. What lies between the two marks is also the cffi declaration.
 */
#ifndef TUCKCTL_FLOOR_H
#define TUCKCTL_FLOOR_H

#include <stddef.h>
#include <stdint.h>

/* cdef: begin */
/* The kernel's struct statmount; what is called [str] there is an offset into str. */
struct tuck_statmount {
    uint32_t size;
    uint32_t mnt_opts;
    uint64_t mask;
    uint32_t sb_dev_major;
    uint32_t sb_dev_minor;
    uint64_t sb_magic;
    uint32_t sb_flags;
    uint32_t fs_type;
    uint64_t mnt_id;
    uint64_t mnt_parent_id;
    uint32_t mnt_id_old;
    uint32_t mnt_parent_id_old;
    uint64_t mnt_attr;
    uint64_t mnt_propagation;
    uint64_t mnt_peer_group;
    uint64_t mnt_master;
    uint64_t propagate_from;
    uint32_t mnt_root;
    uint32_t mnt_point;
    uint64_t mnt_ns_id;
    uint32_t fs_subtype;
    uint32_t sb_source;
    uint32_t opt_num;
    uint32_t opt_array;
    uint32_t opt_sec_num;
    uint32_t opt_sec_array;
    uint64_t spare[46];
    char str[];
};

struct tuck_loop_status {
    uint64_t backing_dev;
    uint64_t backing_ino;
    uint64_t offset;
    uint64_t size_limit;
    uint32_t number;
    uint32_t flags;
};

struct tuck_namespace {
    uint64_t id;
    uint64_t inode;
    uint64_t mounts;
    uint64_t owner; /* the inode of the user namespace that owns it, 0 where that may not be known */
};

/* A device number as statmount and statx split it. */
struct tuck_dev {
    uint32_t major;
    uint32_t minor;
};

/* One mount of a superblock that was looked for. */
struct tuck_match {
    uint64_t namespace_id;
    uint64_t namespace_inode;
    uint64_t mount_id;
    uint64_t parent_id;
    uint64_t attributes;
    uint64_t propagation;
    uint64_t peer_group;
    uint64_t master;
    uint64_t owner; /* as of its namespace */
    uint64_t above; /* the first of the mounts that lie on it or below it and have ids beyond `after`, 0 for none */
    struct tuck_dev device;
};

/* A mount in the namespace `space`, and the detached mount that is to take its place. */
struct tuck_replacement {
    int32_t space;
    int32_t clone;
    uint64_t namespace_id;
    uint64_t clone_id;
    uint64_t mount_id;
    uint64_t parent_id;
    const char *root;       /* the part of its superblock that it has to show, NULL for any */
    struct tuck_dev device; /* the clone's */
    struct tuck_dev around; /* that of the mount on which it lies */
    uint32_t words;         /* where in a text that one's root and place, and its own place, are told */
    int32_t placed;
    int32_t error;
};

/* A mount of some namespace. Told of it are where its facts begin in a text, and the first of the mounts that lie on
 * it or below it and have ids beyond `after`, 0 for none; or why nothing could be told, as -errno. */
struct tuck_facts {
    uint64_t namespace_id;
    uint64_t mount_id;
    uint64_t above;
    uint32_t offset;
    int32_t error;
};

struct tuck_process {
    int32_t pid;
    uint64_t mount_namespace; /* the inode of its nsfs file */
};

/* What a thread holds, or its process, whose number it has then. Where only the device number told of it, mount_id
 * is 0. */
struct tuck_holder {
    int32_t pid;
    int32_t thread;
    int32_t kind;
    struct tuck_dev device;
    uint64_t mount_id;
    uint64_t number;
    uint64_t end;
};

/* Shared between a watcher and who reads its counts; stop and pause_us are for the latter to set. */
struct tuck_counts {
    uint32_t stop;
    uint32_t ready;
    uint32_t pause_us;
    uint64_t looks;
    uint64_t seen[8];
    uint64_t other;
    uint64_t errors;
    uint64_t last_errno;
    uint64_t longest_absence_ns;
    char sample[128];
};

/* The new mount interface. */
int tuck_fsopen(const char *fstype, unsigned int flags);
int tuck_fsconfig_set_flag(int context, const char *key);
int tuck_fsconfig_set_string(int context, const char *key, const char *value);
int tuck_fsconfig_set_fd(int context, const char *key, int value);
int tuck_fsconfig_create(int context);
int tuck_fsconfig_reconfigure(int context);
int64_t tuck_fscontext_message(int context, char *ret_message, size_t size);
int tuck_fsmount(int context, unsigned int flags, unsigned int attributes);
int tuck_fspick(int directory, const char *path, unsigned int flags);
int tuck_open_tree(int directory, const char *path, unsigned int flags);
int tuck_open_tree_attr(int directory, const char *path, unsigned int flags, uint64_t set, uint64_t clear,
                        uint64_t propagation, uint64_t user_namespace);
int tuck_move_mount(int from_directory, const char *from_path, int to_directory, const char *to_path,
                    unsigned int flags);
int tuck_mount_setattr(int directory, const char *path, unsigned int flags, uint64_t set, uint64_t clear,
                       uint64_t propagation, uint64_t user_namespace);
int tuck_umount2(const char *path, int flags);
int tuck_pivot_root(const char *new_root, const char *put_old);

/* What is mounted. */
int tuck_statmount(uint64_t mount_id, uint64_t namespace_id, uint64_t mask, struct tuck_statmount *ret_mount,
                   size_t size);
int64_t tuck_listmount(uint64_t mount_id, uint64_t namespace_id, uint64_t after, uint64_t *ret_ids, size_t count);
int tuck_mount_id(int directory, const char *path, int flags, uint64_t *ret_id);
int tuck_openat2(int directory, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve);

/* Namespaces. setns and unshare act on the calling thread: call them on a thread of their own. */
int tuck_setns(int namespace_fd, int type);
int tuck_unshare(int flags);
int tuck_namespace_id(int namespace_fd, uint64_t *ret_id);
int tuck_namespace_info(int namespace_fd, struct tuck_namespace *ret_namespace);
int tuck_namespace_next(int namespace_fd, struct tuck_namespace *ret_namespace);
int tuck_namespace_previous(int namespace_fd, struct tuck_namespace *ret_namespace);
/* The same, and only its id is told. */
int tuck_namespace_after(int namespace_fd, uint64_t *ret_id);
int tuck_namespace_before(int namespace_fd, uint64_t *ret_id);
int tuck_namespace_owner(int namespace_fd);
/* Opens the next namespace, or the one before, whose id is one of these; they are in ascending order. */
int tuck_namespace_seek(int namespace_fd, int forwards, const uint64_t *ids, size_t count, uint64_t *ret_id);

/* In each of these namespaces: puts the clone beneath the mount, and unmounts that. It does so only where nothing lies
 * on the mount, it is seen at its place, it lies on `parent_id`, and that one has no peers and another device than the
 * clone; else, and where it fails, `error` says -errno.
 * `placed` says whether the clone lies there. It leaves the calling thread in one of the namespaces. */
void tuck_replace(struct tuck_replacement *replacements, size_t count);
/* The same in every namespace that has one of these ids; they are in ascending order. Each gets a private clone of
 * `source`, which is left open where it lies beneath the mount and did not take its place. Where the namespace is not
 * found, `error` says so. The text tells of each where it was; what is the same as before is told once. It leaves the
 * calling thread in the namespace `home`, of which source has to be. */
int tuck_replace_everywhere(int home, int source, struct tuck_replacement *replacements, size_t count, char *ret_text,
                            size_t size);
/* Unmounts each of these, one right after the other, up to the first that fails: 0 or its -errno. */
int tuck_umount_each(const char *const *paths, const int *flags, size_t count, size_t *ret_done);

/* Loop devices, file clones and room for what is to be written. */
int tuck_loop_get_free(int control);
int tuck_loop_configure(int loop, int backing, uint32_t block_size, uint32_t flags);
int tuck_loop_clear(int loop);
int tuck_loop_status(int loop, struct tuck_loop_status *ret_status);
int tuck_clone_file(int to, int from);
int tuck_reserve(int file, uint64_t size);

/* Walks: many looks in one call. A count larger than what was given room for says how much is needed. Mounts are
 * found whose ids are beyond `after`: ids only grow. */
int64_t tuck_list_namespaces(int namespace_fd, struct tuck_namespace *ret_namespaces, size_t count);
int64_t tuck_find_mounts(const struct tuck_namespace *namespaces, size_t namespace_count, uint64_t after,
                         const struct tuck_dev *devices, size_t device_count, struct tuck_match *ret_matches,
                         size_t count, size_t *ret_unseen);
/* The same in every mount namespace that the caller may see, from its own on. What lies on a mount is looked for where
 * it is one of the first `covered_count` devices; `known` is what an earlier call found. */
int64_t tuck_find_everywhere(int namespace_fd, uint64_t after, const struct tuck_dev *devices, size_t device_count,
                             size_t covered_count, const struct tuck_match *known, size_t known_count,
                             struct tuck_match *ret_matches, size_t count, size_t *ret_unseen);
/* Tells of many mounts, each by a struct tuck_statmount in the text. Returns how many found room there. */
int64_t tuck_statmount_each(struct tuck_facts *mounts, size_t count, uint64_t mask, uint64_t after, char *ret_text,
                            size_t size);
/* Finds what is mounted over a directory above a mount, so that the mount's path leads there. Gives its place, up to
 * the size, and returns that one's length; 0 where there is nothing. */
int64_t tuck_cover_above(uint64_t mount_id, uint64_t namespace_id, char *ret_point, size_t size);
/* The processes whose mount namespaces may be known. */
int64_t tuck_list_processes(int proc, struct tuck_process *ret_processes, size_t count);
/* Reads the same file of many processes one after the other, and where each ends; one that cannot be read is empty.
 * Returns how many found room. */
int64_t tuck_read_each(int proc, const int32_t *pids, size_t count, const char *name, char *ret_text, size_t size,
                       size_t *ret_ends);
/* Looks at those processes whose pids leave `share` when they are divided by `shares`. */
int64_t tuck_find_holders(int proc, int32_t share, int32_t shares, const uint64_t *mount_ids, size_t mount_count,
                          const struct tuck_dev *devices, size_t device_count, struct tuck_holder *ret_holders,
                          size_t count, size_t *ret_unseen);

/* Looks at a path until told to stop, and counts what it saw. */
int tuck_watch(int how, const char *path, const char *const *expected, size_t expected_count, uint32_t good,
               struct tuck_counts *counts);
/* Has the kernel send the calling process a signal when its parent ends. */
int tuck_end_with_parent(int signal);
/* cdef: end */

/* tuck_holder.kind; for FD and WATCH number is the fd, for MAP number and end are the addresses. */
enum { TUCK_HOLD_FD, TUCK_HOLD_CWD, TUCK_HOLD_ROOT, TUCK_HOLD_EXE, TUCK_HOLD_MAP, TUCK_HOLD_WATCH };

/* tuck_watch's how. */
enum { TUCK_WATCH_READ, TUCK_WATCH_STAT, TUCK_WATCH_READDIR, TUCK_WATCH_EXECVE };

#endif
