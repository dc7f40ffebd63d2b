/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calls every function of the floor on the running kernel: the way it succeeds, and the ways it fails.
 * Wants a mount namespace of its own; a directory to work in is the argument.
 */
#include "floor.h"
#include "check.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <linux/loop.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    CLONE_TREE = 1,         /* OPEN_TREE_CLONE */
    EMPTY_FROM = 0x4,       /* MOVE_MOUNT_F_EMPTY_PATH */
    EMPTY_TO = 0x40,        /* MOVE_MOUNT_T_EMPTY_PATH */
    BENEATH = 0x200,        /* MOVE_MOUNT_BENEATH */
    ATTRIBUTE_RDONLY = 1,   /* MOUNT_ATTR_RDONLY */
    ATTRIBUTE_NOSUID = 2,   /* MOUNT_ATTR_NOSUID */
    ATTRIBUTE_ATIME = 0x70, /* MOUNT_ATTR__ATIME */
    ATTRIBUTE_UNKNOWN = 1 << 30,
    SB_BASIC = 1, /* STATMOUNT_SB_BASIC, and so on */
    MNT_BASIC = 2,
    MNT_POINT = 0x10,
    FS_TYPE = 0x20,
    NO_SYMLINKS = 0x4, /* RESOLVE_NO_SYMLINKS */
    NO_SUCH_FD = 1000,
};
static const uint64_t EVERY_MOUNT = UINT64_MAX; /* LSMT_ROOT */

extern char **environ;

/* Neither a user namespace's root nor a container's may use loop devices or see other namespaces. */
static bool privileged;

static int open_descriptors(void) {
    int count = 0;
    for (int fd = 3; fd < NO_SUCH_FD; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

static void write_file(const char *path, const char *text, mode_t mode) {
    int fd = SYS(open(path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, mode));
    TRUE(write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    close(fd);
}

/* A detached tmpfs. */
static int make_tmpfs(void) {
    int context = FD(tuck_fsopen("tmpfs", 1));
    OK(tuck_fsconfig_set_string(context, "size", "256m"));
    OK(tuck_fsconfig_create(context));
    int mount = FD(tuck_fsmount(context, 1, 0));
    close(context);
    return mount;
}

static void attach(int mount, const char *path) {
    OK(tuck_move_mount(mount, "", AT_FDCWD, path, EMPTY_FROM));
}

static void mount_tmpfs(const char *path) {
    int mount = make_tmpfs();
    attach(mount, path);
    close(mount);
}

static uint64_t id_of(const char *path) {
    uint64_t id = 0;
    OK(tuck_mount_id(AT_FDCWD, path, 0, &id));
    return id;
}

static struct tuck_dev device_of(const char *path) {
    struct tuck_statmount mount;
    OK(tuck_statmount(id_of(path), 0, SB_BASIC, &mount, sizeof mount));
    return (struct tuck_dev){mount.sb_dev_major, mount.sb_dev_minor};
}

static void filesystem_contexts(void) {
    char message[256];
    FAILS(tuck_fsopen("no such filesystem", 0), ENODEV);
    FAILS(tuck_fsopen("tmpfs", 0x80), EINVAL);

    int context = FD(tuck_fsopen("tmpfs", 1));
    FAILS(tuck_fscontext_message(context, message, sizeof message), ENODATA);
    FAILS(tuck_fsmount(context, 1, 0), EINVAL);
    OK(tuck_fsconfig_set_flag(context, "ro"));
    FAILS(tuck_fsconfig_set_flag(context, "nonsense"), EINVAL);
    FAILS(tuck_fscontext_message(context, message, 1), EMSGSIZE);
    FAILS(tuck_fsconfig_set_flag(context, "nonsense"), EINVAL);
    int64_t length = OK(tuck_fscontext_message(context, message, sizeof message - 1));
    message[length] = '\0';
    TRUE(strstr(message, "nonsense") != NULL);
    OK(tuck_fsconfig_set_string(context, "size", "1m"));
    FAILS(tuck_fsconfig_set_string(context, "size", "many"), EINVAL);
    FAILS(tuck_fsconfig_set_fd(context, "size", NO_SUCH_FD), EBADF);
    FAILS(tuck_fsconfig_reconfigure(context), EBUSY);
    OK(tuck_fsconfig_create(context));
    FAILS(tuck_fsconfig_create(context), EBUSY);
    FAILS(tuck_fsmount(context, 1, ATTRIBUTE_UNKNOWN), EINVAL);
    int mount = FD(tuck_fsmount(context, 1, ATTRIBUTE_NOSUID));
    close(mount);
    close(context);

    FAILS(tuck_fsconfig_set_flag(NO_SUCH_FD, "ro"), EBADF);
    FAILS(tuck_fsconfig_set_string(NO_SUCH_FD, "size", "1m"), EBADF);
    FAILS(tuck_fsconfig_set_fd(NO_SUCH_FD, "lowerdir+", 0), EBADF);
    FAILS(tuck_fsconfig_create(NO_SUCH_FD), EBADF);
    FAILS(tuck_fsconfig_reconfigure(NO_SUCH_FD), EBADF);
    FAILS(tuck_fscontext_message(NO_SUCH_FD, message, sizeof message), EBADF);
    FAILS(tuck_fsmount(NO_SUCH_FD, 0, 0), EBADF);
}

static void reconfiguring(void) {
    SYS(mkdir("again", 0755));
    mount_tmpfs("again");
    write_file("again/file", "x", 0644);
    FAILS(tuck_fspick(AT_FDCWD, "absent", 1), ENOENT);
    FAILS(tuck_fspick(AT_FDCWD, "again/file", 1), EINVAL);
    int context = FD(tuck_fspick(AT_FDCWD, "again", 1));
    OK(tuck_fsconfig_set_flag(context, "ro"));
    OK(tuck_fsconfig_reconfigure(context));
    close(context);
    TRUE(open("again/file", O_WRONLY | O_CLOEXEC) < 0 && errno == EROFS);
    OK(tuck_umount2("again", 0));
    SYS(rmdir("again"));
}

static void overlay_by_descriptors(void) {
    SYS(mkdir("lower", 0755));
    SYS(mkdir("upper", 0755));
    SYS(mkdir("merged", 0755));
    write_file("lower/from-lower", "lower", 0644);
    write_file("upper/from-upper", "upper", 0644);
    int lower = SYS(open("lower", O_PATH | O_DIRECTORY | O_CLOEXEC));
    int upper = SYS(open("upper", O_PATH | O_DIRECTORY | O_CLOEXEC));
    int file = SYS(open("lower/from-lower", O_PATH | O_CLOEXEC));

    int context = FD(tuck_fsopen("overlay", 1));
    OK(tuck_fsconfig_set_fd(context, "lowerdir+", upper));
    OK(tuck_fsconfig_set_fd(context, "lowerdir+", lower));
    FAILS(tuck_fsconfig_set_fd(context, "lowerdir+", file), EINVAL);
    OK(tuck_fsconfig_set_string(context, "source", "test"));
    OK(tuck_fsconfig_create(context));
    int mount = FD(tuck_fsmount(context, 1, ATTRIBUTE_RDONLY));
    attach(mount, "merged");
    TRUE(access("merged/from-lower", R_OK) == 0 && access("merged/from-upper", R_OK) == 0);
    close(context);
    close(mount);

    /* One lower layer without an upper one is no overlay. */
    context = FD(tuck_fsopen("overlay", 1));
    OK(tuck_fsconfig_set_fd(context, "lowerdir+", lower));
    FAILS(tuck_fsconfig_create(context), EINVAL);
    close(context);
    close(lower);
    close(upper);
    close(file);
    OK(tuck_umount2("merged", 0));
}

static void trees(void) {
    SYS(mkdir("tree", 0755));
    mount_tmpfs("tree");
    write_file("tree/file", "x", 0644);
    FAILS(tuck_open_tree(AT_FDCWD, "absent", CLONE_TREE), ENOENT);
    FAILS(tuck_open_tree(AT_FDCWD, "tree", 1u << 30), EINVAL);
    int tree = FD(tuck_open_tree(AT_FDCWD, "tree", CLONE_TREE | O_CLOEXEC));

    OK(tuck_mount_setattr(tree, "", AT_EMPTY_PATH, ATTRIBUTE_RDONLY, 0, 0, 0));
    TRUE(openat(tree, "file", O_WRONLY | O_CLOEXEC) < 0 && errno == EROFS);
    OK(tuck_mount_setattr(tree, "", AT_EMPTY_PATH, 0, ATTRIBUTE_RDONLY, MS_PRIVATE, 0));
    int file = SYS(openat(tree, "file", O_WRONLY | O_CLOEXEC));
    FAILS(tuck_mount_setattr(tree, "", AT_EMPTY_PATH, ATTRIBUTE_RDONLY, 0, 0, 0), EBUSY);
    close(file);
    FAILS(tuck_mount_setattr(tree, "", AT_EMPTY_PATH, ATTRIBUTE_UNKNOWN, 0, 0, 0), EINVAL);
    FAILS(tuck_mount_setattr(tree, "", AT_EMPTY_PATH, 0, 0, MS_PRIVATE | MS_SHARED, 0), EINVAL);
    FAILS(tuck_mount_setattr(AT_FDCWD, "absent", 0, ATTRIBUTE_RDONLY, 0, 0, 0), ENOENT);
    close(tree);

    tree = FD(tuck_open_tree_attr(AT_FDCWD, "tree", CLONE_TREE | O_CLOEXEC, ATTRIBUTE_RDONLY, 0, MS_PRIVATE, 0));
    TRUE(openat(tree, "file", O_WRONLY | O_CLOEXEC) < 0 && errno == EROFS);
    close(tree);
    FAILS(tuck_open_tree_attr(AT_FDCWD, "tree", CLONE_TREE, ATTRIBUTE_UNKNOWN, 0, 0, 0), EINVAL);
    FAILS(tuck_open_tree_attr(AT_FDCWD, "tree", CLONE_TREE, 0, ATTRIBUTE_ATIME - 0x10, 0, 0), EINVAL);
    FAILS(tuck_open_tree_attr(AT_FDCWD, "absent", CLONE_TREE, 0, 0, 0, 0), ENOENT);
    OK(tuck_umount2("tree", 0));
    SYS(rmdir("tree"));
}

static void the_swap(void) {
    SYS(mkdir("target", 0755));
    FAILS(tuck_move_mount(NO_SUCH_FD, "", AT_FDCWD, "target", EMPTY_FROM), EBADF);
    FAILS(tuck_move_mount(AT_FDCWD, "target", AT_FDCWD, "lower", 0), EINVAL);
    FAILS(tuck_umount2("target", 0), EINVAL);
    FAILS(tuck_umount2("absent", 0), ENOENT);

    mount_tmpfs("target");
    write_file("target/content", "old", 0644);
    uint64_t old = id_of("target");

    int mount = make_tmpfs();
    int content = SYS(openat(mount, "content", O_CREAT | O_WRONLY | O_CLOEXEC, 0644));
    TRUE(write(content, "new", 3) == 3);
    close(content);
    uint64_t new = 0;
    OK(tuck_mount_id(mount, "", AT_EMPTY_PATH, &new));

    FAILS(tuck_move_mount(mount, "", AT_FDCWD, "target", EMPTY_FROM | 1u << 30), EINVAL);
    FAILS(tuck_move_mount(mount, "", AT_FDCWD, "target/content", EMPTY_FROM | BENEATH), EINVAL);
    OK(tuck_move_mount(mount, "", AT_FDCWD, "target", EMPTY_FROM | BENEATH));
    close(mount);
    TRUE(id_of("target") == old);

    int held = SYS(open("target/content", O_RDONLY | O_CLOEXEC));
    FAILS(tuck_umount2("target", 0), EBUSY);
    TRUE(id_of("target") == old);
    OK(tuck_umount2("target", MNT_DETACH));
    TRUE(id_of("target") == new);
    close(held);

    /* By two descriptors, with no path at all. */
    int target = SYS(open("target", O_PATH | O_DIRECTORY | O_CLOEXEC));
    mount = make_tmpfs();
    OK(tuck_move_mount(mount, "", target, "", EMPTY_FROM | EMPTY_TO | BENEATH));
    close(mount);
    close(target);
    OK(tuck_umount2("target", 0));
    TRUE(id_of("target") != new);
    OK(tuck_umount2("target", 0));
    SYS(rmdir("target"));
}

static void what_is_mounted(void) {
    struct {
        struct tuck_statmount mount;
        char text[4096];
    } found;
    uint64_t ids[64], id = 0, absent = UINT64_MAX - 1;

    SYS(mkdir("seen", 0755));
    mount_tmpfs("seen");
    FAILS(tuck_mount_id(AT_FDCWD, "absent", 0, &id), ENOENT);
    FAILS(tuck_mount_id(NO_SUCH_FD, "", AT_EMPTY_PATH, &id), EBADF);
    id = id_of("seen");

    OK(tuck_statmount(id, 0, SB_BASIC | MNT_BASIC | MNT_POINT | FS_TYPE, &found.mount, sizeof found));
    TRUE(found.mount.mnt_id == id);
    TRUE(found.mount.mnt_parent_id == id_of("."));
    TRUE(strcmp(found.mount.str + found.mount.fs_type, "tmpfs") == 0);
    const char *point = found.mount.str + found.mount.mnt_point;
    TRUE(strlen(point) >= 5 && strcmp(point + strlen(point) - 5, "/seen") == 0);
    FAILS(tuck_statmount(id, 0, MNT_POINT | FS_TYPE, &found.mount, sizeof found.mount + 2), EOVERFLOW);
    FAILS(tuck_statmount(absent, 0, MNT_BASIC, &found.mount, sizeof found), ENOENT);

    int64_t count = OK(tuck_listmount(EVERY_MOUNT, 0, 0, ids, 64));
    TRUE(count >= 2);
    TRUE(OK(tuck_listmount(EVERY_MOUNT, 0, 0, ids, 1)) == 1);
    TRUE(OK(tuck_listmount(EVERY_MOUNT, 0, id - 1, ids, 64)) >= 1 && ids[0] == id);
    TRUE(OK(tuck_listmount(id_of("."), 0, id - 1, ids, 64)) >= 1 && ids[0] == id);
    TRUE(OK(tuck_listmount(EVERY_MOUNT, 0, id, ids, 64)) == 0);
    FAILS(tuck_listmount(absent, 0, 0, ids, 64), ENOENT);
    OK(tuck_umount2("seen", 0));
    FAILS(tuck_statmount(id, 0, MNT_BASIC, &found.mount, sizeof found), ENOENT);
    SYS(rmdir("seen"));

    SYS(symlink("lower", "link"));
    int fd = FD(tuck_openat2(AT_FDCWD, "lower/from-lower", O_RDONLY | O_CLOEXEC, 0, NO_SYMLINKS));
    close(fd);
    fd = FD(tuck_openat2(AT_FDCWD, "made", O_CREAT | O_WRONLY | O_CLOEXEC, 0600, 0));
    close(fd);
    FAILS(tuck_openat2(AT_FDCWD, "link/from-lower", O_RDONLY | O_CLOEXEC, 0, NO_SYMLINKS), ELOOP);
    FAILS(tuck_openat2(AT_FDCWD, "lower", O_RDONLY | O_CLOEXEC, 0600, 0), EINVAL);
    FAILS(tuck_openat2(AT_FDCWD, "lower", O_RDONLY | O_CLOEXEC, 0, 1u << 30), EINVAL);
}

static void many_mounts(void) {
    enum { FACTS = SB_BASIC | MNT_BASIC | MNT_POINT };
    static union {
        struct tuck_statmount mount;
        char text[4096];
    } room;
    SYS(mkdir("many", 0755));
    mount_tmpfs("many");
    SYS(mkdir("many/below", 0755));
    mount_tmpfs("many/below");
    struct tuck_facts each[] = {
        {.mount_id = id_of("many")}, {.mount_id = UINT64_MAX - 1}, {.mount_id = id_of("many/below")}};

    TRUE(OK(tuck_statmount_each(each, 3, FACTS, 0, room.text, sizeof room)) == 3);
    const struct tuck_statmount *first = (const void *)(room.text + each[0].offset);
    const struct tuck_statmount *last = (const void *)(room.text + each[2].offset);
    TRUE(each[0].error == 0 && each[0].above == each[2].mount_id && first->mnt_id == each[0].mount_id);
    TRUE(each[1].error == -ENOENT && each[1].above == 0);
    TRUE(each[2].error == 0 && each[2].above == 0 && last->mnt_parent_id == first->mnt_id);
    const char *point = last->str + last->mnt_point;
    TRUE(strcmp(point + strlen(point) - 11, "/many/below") == 0);

    /* What lies on it is told where it is new enough; where there is no room, as far as there is. */
    TRUE(OK(tuck_statmount_each(each, 1, FACTS, each[2].mount_id, room.text, sizeof room)) == 1);
    TRUE(each[0].above == 0);
    TRUE(OK(tuck_statmount_each(each, 3, FACTS, 0, room.text, sizeof room.mount + 1)) == 0);
    TRUE(OK(tuck_statmount_each(each, 3, FACTS, 0, room.text, first->size + 8 + sizeof room.mount)) == 2);
    TRUE(OK(tuck_statmount_each(each, 3, FACTS, 0, room.text, sizeof room.mount - 1)) == 0);
    TRUE(OK(tuck_statmount_each(each, 0, FACTS, 0, room.text, 0)) == 0);

    /* What is mounted over a directory above a mount is told, and nothing else. */
    char cover[4096];
    const uint64_t below = each[2].mount_id;
    TRUE(OK(tuck_cover_above(below, 0, cover, sizeof cover)) == 0);
    mount_tmpfs("many/below");
    SYS(mkdir("many/beside", 0755));
    mount_tmpfs("many/beside");
    TRUE(OK(tuck_cover_above(below, 0, cover, sizeof cover)) == 0);
    mount_tmpfs("many");
    int64_t length = OK(tuck_cover_above(below, 0, cover, sizeof cover));
    TRUE(length > 5 && memcmp(cover + length - 5, "/many", 5) == 0);
    cover[1] = 'x';
    TRUE(OK(tuck_cover_above(below, 0, cover, 1)) == length && cover[0] == '/' && cover[1] == 'x');
    FAILS(tuck_cover_above(UINT64_MAX - 1, 0, cover, sizeof cover), ENOENT);
    OK(tuck_umount2("many", 0));
    OK(tuck_umount2("many/beside", 0));
    OK(tuck_umount2("many/below", 0));

    OK(tuck_umount2("many/below", 0));
    OK(tuck_umount2("many", 0));
    SYS(rmdir("many"));
}

static void processes(void) {
    enum { MOST = 65536 };
    struct tuck_process *found = calloc(MOST, sizeof *found), none;
    struct stat status;
    const int32_t own = (int32_t)getpid();
    TRUE(found != NULL);
    int proc = SYS(open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    SYS(stat("/proc/self/ns/mnt", &status));
    int64_t count = OK(tuck_list_processes(proc, found, MOST)), mine = -1;
    TRUE(count >= 1 && count <= MOST);
    for (int64_t i = 0; i < count; i++)
        if (found[i].pid == own)
            mine = i;
    TRUE(mine >= 0 && found[mine].mount_namespace == status.st_ino);
    TRUE(OK(tuck_list_processes(proc, &none, 0)) >= 1);
    FAILS(tuck_list_processes(NO_SUCH_FD, found, MOST), EBADF);
    free(found);

    const int32_t pids[] = {own, INT32_MAX, own};
    size_t ends[3];
    char text[4096], alone[64];
    TRUE(OK(tuck_read_each(proc, pids, 3, "comm", text, sizeof text, ends)) == 3);
    FILE *comm = fopen("/proc/self/comm", "re");
    TRUE(comm != NULL && fgets(alone, sizeof alone, comm) != NULL);
    fclose(comm);
    TRUE(ends[0] == strlen(alone) && ends[1] == ends[0] && ends[2] == 2 * ends[0]);
    TRUE(memcmp(text, alone, ends[0]) == 0 && memcmp(text + ends[1], alone, ends[0]) == 0);
    TRUE(OK(tuck_read_each(proc, pids, 3, "comm", text, ends[0] + 1, ends)) == 2);
    TRUE(OK(tuck_read_each(proc, pids, 3, "comm", text, ends[0], ends)) == 0);
    TRUE(OK(tuck_read_each(proc, pids, 1, "no-such-file", text, sizeof text, ends)) == 1 && ends[0] == 0);
    memset(text, 'x', 100);
    text[100] = '\0';
    FAILS(tuck_read_each(proc, pids, 1, text, text, sizeof text, ends), ENAMETOOLONG);
    close(proc);
}

struct visit {
    int entered;  /* the namespace to enter; -1 asks for a new one */
    int ret_made; /* a descriptor on the new one */
    uint64_t ret_seen;
};

static void *visit(void *argument) {
    struct visit *visit = argument;
    OK(tuck_unshare(CLONE_FS));
    if (visit->entered >= 0) {
        OK(tuck_setns(visit->entered, CLONE_NEWNS));
    } else {
        OK(tuck_unshare(CLONE_NEWNS));
        visit->ret_made = SYS(open("/proc/thread-self/ns/mnt", O_RDONLY | O_CLOEXEC));
    }
    int space = SYS(open("/proc/thread-self/ns/mnt", O_RDONLY | O_CLOEXEC));
    OK(tuck_namespace_id(space, &visit->ret_seen));
    close(space);
    return NULL;
}

static struct visit go(int entered) {
    struct visit there = {.entered = entered, .ret_made = -1};
    pthread_t thread;
    TRUE(pthread_create(&thread, NULL, visit, &there) == 0);
    TRUE(pthread_join(thread, NULL) == 0);
    return there;
}

static void *enter_without_own_directory(void *argument) {
    FAILS(tuck_setns(*(int *)argument, CLONE_NEWNS), EINVAL);
    return NULL;
}

struct blind {
    struct tuck_namespace asked[2];
    struct tuck_dev device;
};

/* A thread has capabilities of its own: without them it may look into the namespace it is in, and no other. */
static void *look_without_capabilities(void *argument) {
    const struct blind *blind = argument;
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {{0}};
    struct tuck_match matches[16];
    size_t unseen = 0;
    SYS((int)syscall(SYS_capset, &header, none));
    TRUE(OK(tuck_find_mounts(blind->asked, 2, 0, &blind->device, 1, matches, 16, &unseen)) >= 1);
    TRUE(matches[0].namespace_id == blind->asked[0].id);
    TRUE(unseen == 1);
    return NULL;
}

static void walk_to_the_end(int from, int (*step)(int, struct tuck_namespace *)) {
    struct tuck_namespace info;
    int current = from, following;
    while ((following = step(current, &info)) >= 0) {
        if (current != from)
            close(current);
        current = following;
    }
    if (current != from)
        close(current);
    FAILS(following, ENOENT);
}

static void *pivot(void *argument) {
    const char *folder = argument;
    OK(tuck_unshare(CLONE_FS));
    OK(tuck_unshare(CLONE_NEWNS));
    SYS(chdir(folder));
    FAILS(tuck_pivot_root("absent", "absent"), ENOENT);
    FAILS(tuck_pivot_root("lower", "lower"), EINVAL);
    OK(tuck_pivot_root(".", "."));
    OK(tuck_umount2(".", MNT_DETACH));
    SYS(chdir("/"));
    SYS(access("/lower/from-lower", F_OK));
    return NULL;
}

static void *replace(void *argument) {
    struct tuck_replacement *replacement = argument;
    OK(tuck_unshare(CLONE_FS));
    tuck_replace(replacement, 1);
    return NULL;
}

static void replace_one(struct tuck_replacement *replacement, int placed, int error) {
    pthread_t thread;
    TRUE(pthread_create(&thread, NULL, replace, replacement) == 0);
    TRUE(pthread_join(thread, NULL) == 0);
    TRUE(replacement->placed == placed);
    TRUE(replacement->error == error);
}

static uint64_t id_of_tree(int tree) {
    uint64_t id = 0;
    OK(tuck_mount_id(tree, "", AT_EMPTY_PATH, &id));
    return id;
}

static void unmounts_in_turn(void) {
    const char *const paths[] = {"first", "second", "third"};
    const int flags[] = {0, MNT_DETACH, 0};
    size_t done = 9;
    for (size_t i = 0; i < 2; i++) {
        SYS(mkdir(paths[i], 0755));
        mount_tmpfs(paths[i]);
    }
    FAILS(tuck_umount_each(paths, flags, 3, &done), ENOENT);
    TRUE(done == 2);
    mount_tmpfs("first");
    mount_tmpfs("second");
    int user = SYS(open("second", O_RDONLY | O_CLOEXEC));
    const int plain[] = {0, 0};
    FAILS(tuck_umount_each(paths, plain, 2, &done), EBUSY);
    TRUE(done == 1);
    OK(tuck_umount_each(paths + 1, flags + 1, 1, &done));
    TRUE(done == 1);
    close(user);
}

static void replacements(const char *folder) {
    int own = SYS(open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC));
    pthread_t thread;
    TRUE(pthread_create(&thread, NULL, pivot, (void *)(uintptr_t)folder) == 0);
    TRUE(pthread_join(thread, NULL) == 0);

    SYS(mkdir("replaced", 0755));
    mount_tmpfs("replaced");
    struct tuck_replacement one = {
        .space = own, .clone = make_tmpfs(), .mount_id = id_of("replaced"), .parent_id = id_of(".")};
    uint64_t clone = id_of_tree(one.clone);

    one.space = NO_SUCH_FD;
    replace_one(&one, 0, -EBADF);
    one.space = own;
    one.parent_id = one.mount_id;
    replace_one(&one, 0, -ESTALE);
    one.parent_id = id_of(".");
    one.device = device_of(".");
    replace_one(&one, 0, -EEXIST);
    one.device = (struct tuck_dev){0};
    one.mount_id = id_of(".");
    replace_one(&one, 0, -ESTALE);
    one.mount_id = id_of("replaced");
    one.root = "/elsewhere";
    replace_one(&one, 0, -ESTALE);
    one.root = "/";
    mount_tmpfs("replaced");
    replace_one(&one, 0, -ESTALE);
    OK(tuck_umount2("replaced", 0));
    SYS(mkdir("replaced/above", 0755));
    mount_tmpfs("replaced/above");
    replace_one(&one, 0, -EBUSY);
    OK(tuck_umount2("replaced/above", 0));

    int used = SYS(open("replaced", O_RDONLY | O_CLOEXEC));
    replace_one(&one, 1, -EBUSY);
    TRUE(id_of("replaced") == one.mount_id);
    close(used);
    OK(tuck_umount2("replaced", 0));
    TRUE(id_of("replaced") == clone);
    close(one.clone);

    one.clone = make_tmpfs();
    one.mount_id = clone;
    clone = id_of_tree(one.clone);
    replace_one(&one, 1, 0);
    TRUE(id_of("replaced") == clone);
    close(one.clone);
    OK(tuck_umount2("replaced", 0));
    SYS(rmdir("replaced"));
    close(own);
}

struct everywhere {
    int home, source, error;
    struct tuck_replacement *replacements;
    size_t count, size;
    uint64_t ret_end;
    char text[8192];
};

static void *replace_everywhere(void *argument) {
    struct everywhere *all = argument;
    OK(tuck_unshare(CLONE_FS));
    all->error = tuck_replace_everywhere(all->home, all->source, all->replacements, all->count, all->text, all->size);
    int space = SYS(open("/proc/thread-self/ns/mnt", O_RDONLY | O_CLOEXEC));
    OK(tuck_namespace_id(space, &all->ret_end));
    close(space);
    return NULL;
}

static void run_everywhere(struct everywhere *all) {
    pthread_t thread;
    TRUE(pthread_create(&thread, NULL, replace_everywhere, all) == 0);
    TRUE(pthread_join(thread, NULL) == 0);
}

struct there {
    int space;
    const char *point;
    uint64_t ret_id, ret_parent;
};

static void *look_there(void *argument) {
    struct there *there = argument;
    struct tuck_statmount mount;
    OK(tuck_unshare(CLONE_FS));
    OK(tuck_setns(there->space, CLONE_NEWNS));
    there->ret_id = id_of(there->point);
    OK(tuck_statmount(there->ret_id, 0, MNT_BASIC, &mount, sizeof mount));
    there->ret_parent = mount.mnt_parent_id;
    return NULL;
}

static struct there see_there(int space, const char *point) {
    struct there there = {.space = space, .point = point};
    pthread_t thread;
    TRUE(pthread_create(&thread, NULL, look_there, &there) == 0);
    TRUE(pthread_join(thread, NULL) == 0);
    return there;
}

static int by_namespace(const void *left, const void *right) {
    const struct tuck_replacement *a = left, *b = right;
    return a->namespace_id < b->namespace_id ? -1 : a->namespace_id > b->namespace_id;
}

enum { COUNT = 4 };

static const struct tuck_replacement *of_mount(const struct tuck_replacement *each, uint64_t mount_id) {
    for (int i = 0; i < COUNT; i++)
        if (each[i].mount_id == mount_id)
            return &each[i];
    TRUE(false);
    return NULL;
}

static void replacements_everywhere(const char *folder) {
    char point[4096];
    struct tuck_replacement each[COUNT] = {{0}};
    SYS(mkdir("everywhere", 0755));
    mount_tmpfs("everywhere");
    TRUE(snprintf(point, sizeof point, "%s/everywhere", folder) < (int)sizeof point);
    int own = SYS(open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC)), source = make_tmpfs();
    int spaces[] = {go(-1).ret_made, go(-1).ret_made};
    uint64_t home = 0;
    OK(tuck_namespace_id(own, &home));
    const uint64_t original = id_of("everywhere");

    /* Two elsewhere, one here, and one in a namespace that there is not. */
    const struct there before[] = {see_there(spaces[0], point), see_there(spaces[1], point)};
    for (int i = 0; i < 2; i++) {
        each[i] = (struct tuck_replacement){.mount_id = before[i].ret_id, .parent_id = before[i].ret_parent};
        OK(tuck_namespace_id(spaces[i], &each[i].namespace_id));
    }
    each[2] = (struct tuck_replacement){.namespace_id = home, .mount_id = original, .parent_id = id_of(".")};
    each[3] = (struct tuck_replacement){.namespace_id = UINT64_MAX};
    qsort(each, COUNT, sizeof *each, by_namespace);

    struct everywhere all = {.home = NO_SUCH_FD, .source = source, .replacements = each, .count = COUNT};
    run_everywhere(&all);
    TRUE(all.error == -EBADF && all.ret_end == home);
    all.home = own;
    all.source = NO_SUCH_FD;
    run_everywhere(&all);
    const struct tuck_replacement *here = of_mount(each, original);
    TRUE(here->error == -EBADF && here->clone == -1 && id_of("everywhere") == original);
    all.source = source;
    all.size = 4;
    run_everywhere(&all);
    TRUE(here->error == -EOVERFLOW && here->clone == -1 && id_of("everywhere") == original);

    /* Where it is in use, what came stays beneath it, and is left open. */
    all.size = sizeof all.text;
    int used = SYS(open("everywhere", O_RDONLY | O_CLOEXEC));
    run_everywhere(&all);
    TRUE(all.ret_end == home);
    TRUE(here->placed == 1 && here->error == -EBUSY && id_of("everywhere") == original);
    TRUE(here->clone >= 0 && id_of_tree(here->clone) == here->clone_id);
    close(here->clone);
    close(used);
    OK(tuck_umount2("everywhere", 0));
    TRUE(id_of("everywhere") == here->clone_id);
    TRUE(here->around.major == device_of(".").major && here->around.minor == device_of(".").minor);
    const char *words = all.text + here->words, *around = words + strlen(words) + 1,
               *place = around + strlen(around) + 1;
    TRUE(words[0] == '/' && strncmp(point, around, strlen(around)) == 0 && strcmp(place, point) == 0);
    const struct tuck_replacement *nowhere = of_mount(each, 0);
    TRUE(nowhere->placed == 0 && nowhere->error == -ESRCH && nowhere->clone == -1);

    /* Who may not see every namespace goes nowhere else. */
    TRUE(all.error == (privileged ? 0 : -EPERM));
    for (int i = 0; i < 2; i++) {
        const struct tuck_replacement *one = of_mount(each, before[i].ret_id);
        const struct there after = see_there(spaces[i], point);
        TRUE(one->placed == privileged && one->error == (privileged ? 0 : -ESRCH) && one->clone == -1);
        TRUE(after.ret_id == (privileged ? one->clone_id : before[i].ret_id));
        TRUE(after.ret_parent == before[i].ret_parent);
        TRUE(!privileged || one->words == here->words); /* they are alike */
        close(spaces[i]);
    }
    OK(tuck_umount2("everywhere", 0));
    SYS(rmdir("everywhere"));
    close(source);
    close(own);
}

static void namespaces(void) {
    int file = SYS(open("lower/from-lower", O_RDONLY | O_CLOEXEC));
    int own = SYS(open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC));
    uint64_t own_id = 0, none = 0;
    struct tuck_namespace info, all[256];

    FAILS(tuck_unshare(1), EINVAL);
    FAILS(tuck_setns(NO_SUCH_FD, CLONE_NEWNS), EBADF);
    FAILS(tuck_setns(file, CLONE_NEWNS), EINVAL);
    FAILS(tuck_setns(own, CLONE_NEWNET), EINVAL);
    pthread_t thread;
    TRUE(pthread_create(&thread, NULL, enter_without_own_directory, &own) == 0);
    TRUE(pthread_join(thread, NULL) == 0);

    OK(tuck_namespace_id(own, &own_id));
    FAILS(tuck_namespace_id(file, &none), ENOTTY);
    FAILS(tuck_namespace_id(NO_SUCH_FD, &none), EBADF);
    OK(tuck_namespace_info(own, &info));
    TRUE(info.id == own_id && info.inode != 0 && info.mounts > 0);
    FAILS(tuck_namespace_info(file, &info), ENOTTY);
    FAILS(tuck_namespace_next(file, &info), ENOTTY);
    FAILS(tuck_namespace_previous(file, &info), ENOTTY);
    FAILS(tuck_namespace_after(file, &none), ENOTTY);
    FAILS(tuck_namespace_before(file, &none), ENOTTY);
    FAILS(tuck_namespace_owner(file), ENOTTY);
    int owner = FD(tuck_namespace_owner(own));
    close(owner);
    FAILS(tuck_list_namespaces(file, all, 256), ENOTTY);

    struct visit made = go(-1);
    TRUE(made.ret_seen != own_id);
    TRUE(go(made.ret_made).ret_seen == made.ret_seen);

    /* The mount exists in both namespaces: found in both, counted without room, unseen where there is none. */
    struct tuck_dev device = device_of(".");
    struct tuck_namespace asked[3] = {{.id = own_id}, {.id = made.ret_seen}, {.id = 1}};
    struct tuck_match matches[16];
    size_t unseen = 1;
    TRUE(OK(tuck_find_mounts(asked, 2, 0, &device, 1, matches, 16, &unseen)) >= 2);
    TRUE(unseen == 0);
    TRUE(matches[0].namespace_id == own_id && matches[0].mount_id == id_of("."));
    TRUE(matches[0].device.major == device.major && matches[0].device.minor == device.minor);
    TRUE(OK(tuck_find_mounts(asked, 2, 0, &device, 1, NULL, 0, &unseen)) >= 2);
    TRUE(OK(tuck_find_mounts(asked, 1, 0, NULL, 0, matches, 16, &unseen)) == 0);
    TRUE(OK(tuck_find_mounts(asked, 1, id_of("."), &device, 1, matches, 16, &unseen)) == 0);
    TRUE(OK(tuck_find_mounts(NULL, 0, 0, &device, 1, matches, 16, &unseen)) == 0 && unseen == 0);
    OK(tuck_find_mounts(asked, 3, 0, &device, 1, matches, 16, &unseen));

    struct blind blind = {{asked[0], asked[1]}, device};
    TRUE(pthread_create(&thread, NULL, look_without_capabilities, &blind) == 0);
    TRUE(pthread_join(thread, NULL) == 0);

    if (privileged) {
        /* Ids come from a stock of each processor: the younger namespace may have the lower one. */
        bool above = made.ret_seen > own_id;
        int there = FD(above ? tuck_namespace_next(own, &info) : tuck_namespace_previous(own, &info));
        TRUE((info.id > own_id) == above && info.id != own_id && info.mounts > 0);
        uint64_t id = 0;
        int same = FD(above ? tuck_namespace_after(own, &id) : tuck_namespace_before(own, &id));
        TRUE((id > own_id) == above && id != own_id);
        close(same);
        int back = FD(above ? tuck_namespace_previous(there, &info) : tuck_namespace_next(there, &info));
        TRUE((info.id >= own_id) == above || info.id == own_id);
        close(there);
        close(back);
        uint64_t wanted[2] = {1, made.ret_seen}, found_id = 0;
        int sought = FD(tuck_namespace_seek(own, above, wanted, 2, &found_id));
        TRUE(found_id == made.ret_seen);
        close(sought);
        FAILS(tuck_namespace_seek(own, !above, wanted, 2, &found_id), ENOENT);
        FAILS(tuck_namespace_seek(own, above, wanted, 0, &found_id), ENOENT);

        int64_t everywhere = OK(tuck_find_everywhere(own, 0, &device, 1, 1, NULL, 0, matches, 16, &unseen));
        TRUE(everywhere >= 2 && everywhere <= 16 && unseen == 0);
        TRUE(matches[0].namespace_id == own_id && matches[0].mount_id == id_of("."));
        TRUE(OK(tuck_find_everywhere(own, 0, &device, 1, 0, NULL, 0, NULL, 0, &unseen)) == everywhere);
        struct tuck_match again[16];
        uint64_t newest = 0;
        for (int64_t i = 0; i < everywhere; i++)
            newest = matches[i].mount_id > newest ? matches[i].mount_id : newest;
        size_t known = (size_t)everywhere;
        TRUE(OK(tuck_find_everywhere(own, 0, &device, 1, 1, matches, known, again, 16, &unseen)) == everywhere);
        TRUE(again[0].namespace_inode == matches[0].namespace_inode && again[0].owner == matches[0].owner);
        TRUE(OK(tuck_find_everywhere(own, newest, &device, 1, 1, NULL, 0, again, 16, &unseen)) == 0);
        FAILS(tuck_find_everywhere(file, 0, &device, 1, 1, NULL, 0, matches, 16, &unseen), ENOTTY);
        walk_to_the_end(own, tuck_namespace_next);
        walk_to_the_end(own, tuck_namespace_previous);
        int64_t count = OK(tuck_list_namespaces(own, all, 256));
        TRUE(OK(tuck_list_namespaces(own, NULL, 0)) >= 2 && count >= 2);
        int found = 0;
        for (int64_t i = 0; i < count && i < 256; i++)
            found += all[i].id == own_id || all[i].id == made.ret_seen;
        TRUE(found == 2);
    } else {
        FAILS(tuck_namespace_next(own, &info), EPERM);
        FAILS(tuck_namespace_previous(own, &info), EPERM);
        FAILS(tuck_list_namespaces(own, all, 256), EPERM);
        FAILS(tuck_namespace_seek(own, 1, &own_id, 1, &none), EPERM);
        FAILS(tuck_find_everywhere(own, 0, &device, 1, 1, NULL, 0, matches, 16, &unseen), EPERM);
    }
    close(made.ret_made);
    close(own);
    close(file);
}

static void loop_failures(void) {
    struct tuck_loop_status status;
    int file = SYS(open("lower/from-lower", O_RDONLY | O_CLOEXEC));
    FAILS(tuck_loop_get_free(file), ENOTTY);
    FAILS(tuck_loop_configure(NO_SUCH_FD, file, 0, 0), EBADF);
    FAILS(tuck_loop_configure(file, file, 0, 0), ENOTTY);
    FAILS(tuck_loop_clear(file), ENOTTY);
    FAILS(tuck_loop_status(file, &status), ENOTTY);
    FAILS(tuck_clone_file(NO_SUCH_FD, file), EBADF);
    int to = SYS(open("copy", O_CREAT | O_RDWR | O_CLOEXEC, 0644));
    FAILS(tuck_clone_file(to, file), EOPNOTSUPP);
    FAILS(tuck_reserve(NO_SUCH_FD, 4096), EBADF);
    FAILS(tuck_reserve(file, 0), EINVAL);
    OK(tuck_reserve(to, 4096));
    struct stat reserved;
    SYS(fstat(to, &reserved));
    TRUE(reserved.st_size == 0 && reserved.st_blocks >= 8);
    close(to);
    close(file);
}

/* Another process may take the free one first. */
static int configure_loop(int backing, uint32_t flags, char *ret_path, size_t size) {
    int control = SYS(open("/dev/loop-control", O_RDWR | O_CLOEXEC));
    for (;;) {
        snprintf(ret_path, size, "/dev/loop%d", FD(tuck_loop_get_free(control)));
        int loop = SYS(open(ret_path, O_RDWR | O_CLOEXEC));
        int error = tuck_loop_configure(loop, backing, 0, flags);
        if (error == 0) {
            close(control);
            return loop;
        }
        close(loop);
        FAILS(error, EBUSY);
    }
}

static void loop_devices(void) {
    char path[64];
    struct tuck_loop_status status;
    struct stat backing;
    int file = SYS(open("image", O_CREAT | O_RDWR | O_CLOEXEC, 0644));
    SYS(ftruncate(file, 64 * 512));
    SYS(fstat(file, &backing));
    int loop = configure_loop(file, LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR, path, sizeof path);
    OK(tuck_loop_status(loop, &status));
    TRUE(status.backing_ino == backing.st_ino && status.offset == 0 && status.size_limit == 0);
    TRUE((status.flags & LO_FLAGS_READ_ONLY) != 0);
    FAILS(tuck_loop_configure(loop, file, 0, 0), EBUSY);
    FAILS(tuck_loop_configure(loop, NO_SUCH_FD, 0, 0), EBADF);
    OK(tuck_loop_clear(loop));
    close(loop);
    close(file);
}

static int run(char *const arguments[]) {
    pid_t child;
    int status = -1;
    if (posix_spawnp(&child, arguments[0], NULL, NULL, arguments, environ) != 0)
        return -1;
    SYS(waitpid(child, &status, 0));
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* Clones need a filesystem that shares blocks: XFS, if it can be made here. */
static bool cloned_files(void) {
    char path[64], text[8] = "";
    int image = SYS(open("xfs", O_CREAT | O_RDWR | O_CLOEXEC, 0644));
    SYS(ftruncate(image, 400 << 20));
    if (run((char *[]){"mkfs.xfs", "-q", "xfs", NULL}) != 0) {
        fprintf(stderr, "skipped: a clone that succeeds wants mkfs.xfs\n");
        close(image);
        return false;
    }
    int loop = configure_loop(image, LO_FLAGS_AUTOCLEAR, path, sizeof path);
    int context = FD(tuck_fsopen("xfs", 1));
    OK(tuck_fsconfig_set_string(context, "source", path));
    OK(tuck_fsconfig_create(context));
    int mount = FD(tuck_fsmount(context, 1, 0));
    int from = SYS(openat(mount, "from", O_CREAT | O_RDWR | O_CLOEXEC, 0644));
    int to = SYS(openat(mount, "to", O_CREAT | O_RDWR | O_CLOEXEC, 0644));
    TRUE(write(from, "shared", 6) == 6);
    OK(tuck_clone_file(to, from));
    TRUE(pread(to, text, sizeof text, 0) == 6 && memcmp(text, "shared", 6) == 0);
    FAILS(tuck_clone_file(to, image), EXDEV);
    close(from);
    close(to);
    close(mount);
    close(context);
    close(loop);
    close(image);
    SYS(unlink("xfs"));
    return true;
}

/* What the held process of the next test does. */
static int hold(const char *ready) {
    char byte;
    void *page = MAP_FAILED;
    int fd = SYS(open("mapped", O_RDONLY | O_CLOEXEC));
    page = mmap(NULL, 1, PROT_READ, MAP_SHARED, fd, 0);
    TRUE(page != MAP_FAILED);
    close(fd);
    SYS(open("opened", O_RDONLY | O_CLOEXEC));
    int watch = SYS(inotify_init1(IN_CLOEXEC));
    SYS(inotify_add_watch(watch, ".", IN_CREATE));
    int out = atoi(ready);
    TRUE(write(out, "r", 1) == 1);
    /* It ends with its parent. */
    while (read(0, &byte, 1) > 0)
        ;
    return 0;
}

static void copy_program(const char *to) {
    char buffer[65536];
    ssize_t length;
    int from = SYS(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
    int copy = SYS(open(to, O_CREAT | O_WRONLY | O_CLOEXEC, 0755));
    while ((length = read(from, buffer, sizeof buffer)) > 0)
        TRUE(write(copy, buffer, (size_t)length) == length);
    close(from);
    close(copy);
}

static void holders(void) {
    int hands[2], ready[2];
    char byte, number[16];
    uint64_t counted[6] = {0}, by_device = 0;
    struct tuck_holder found[256];
    size_t unseen = 0;

    SYS(mkdir("held", 0755));
    mount_tmpfs("held");
    write_file("held/mapped", "x", 0644);
    write_file("held/opened", "x", 0644);
    copy_program("held/program");

    SYS(pipe2(hands, O_CLOEXEC));
    SYS(pipe2(ready, O_CLOEXEC));
    pid_t child = SYS(fork());
    if (child == 0) {
        snprintf(number, sizeof number, "%d", ready[1]);
        SYS(dup2(hands[0], 0));
        SYS(fcntl(ready[1], F_SETFD, 0));
        SYS(chdir("held"));
        execl("./program", "program", "--hold", number, NULL);
        _exit(127);
    }
    close(hands[0]);
    close(ready[1]);
    TRUE(read(ready[0], &byte, 1) == 1);

    uint64_t id = id_of("held");
    struct tuck_dev device = device_of("held");
    int proc = SYS(open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC));
    int64_t count = OK(tuck_find_holders(proc, 0, 1, &id, 1, &device, 1, found, 256, &unseen));
    TRUE(count > 0 && count <= 256);
    for (int64_t i = 0; i < count; i++) {
        TRUE(found[i].pid == child && found[i].kind >= 0 && found[i].kind < 6);
        TRUE(found[i].thread == child);
        counted[found[i].kind]++;
        if (found[i].kind == TUCK_HOLD_MAP)
            TRUE(found[i].end > found[i].number);
        if (found[i].mount_id == 0) {
            TRUE(found[i].device.major == device.major && found[i].device.minor == device.minor);
            by_device++;
        }
    }
    TRUE(counted[TUCK_HOLD_FD] == 1);
    TRUE(counted[TUCK_HOLD_CWD] == 1);
    TRUE(counted[TUCK_HOLD_ROOT] == 0);
    TRUE(counted[TUCK_HOLD_EXE] == 1);
    TRUE(counted[TUCK_HOLD_WATCH] == 1);
    /* Only a process with rights in the first user namespace may follow what is mapped; else its device tells. */
    TRUE(counted[TUCK_HOLD_MAP] >= 1);
    TRUE(by_device == (privileged ? 1 : 1 + counted[TUCK_HOLD_MAP]));
    TRUE(OK(tuck_find_holders(proc, 0, 1, &id, 1, &device, 1, NULL, 0, &unseen)) == count);
    TRUE(OK(tuck_find_holders(proc, child % 2, 2, &id, 1, &device, 1, NULL, 0, &unseen)) == count);
    TRUE(OK(tuck_find_holders(proc, 1 - child % 2, 2, &id, 1, &device, 1, NULL, 0, &unseen)) == 0);
    TRUE(OK(tuck_find_holders(proc, 0, 1, NULL, 0, NULL, 0, found, 256, &unseen)) == 0);
    uint64_t others[3] = {1, id, UINT64_MAX};
    TRUE(OK(tuck_find_holders(proc, 0, 1, others, 3, NULL, 0, found, 256, &unseen)) == count - (int64_t)by_device);
    FAILS(tuck_find_holders(NO_SUCH_FD, 0, 1, &id, 1, NULL, 0, found, 256, &unseen), EBADF);
    int file = SYS(open("lower/from-lower", O_RDONLY | O_CLOEXEC));
    FAILS(tuck_find_holders(file, 0, 1, &id, 1, NULL, 0, found, 256, &unseen), ENOTDIR);
    close(file);
    close(proc);

    int status = 0;
    close(hands[1]);
    SYS(waitpid(child, &status, 0));
    TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    close(ready[0]);
    OK(tuck_umount2("held", 0));
    SYS(rmdir("held"));
}

/* A process whose root is on the mount. */
static void root_holder(void) {
    int hands[2], ready[2];
    char byte;
    struct tuck_holder found[16];
    size_t unseen = 0;
    SYS(mkdir("root", 0755));
    mount_tmpfs("root");
    uint64_t id = id_of("root");
    SYS(pipe2(hands, O_CLOEXEC));
    SYS(pipe2(ready, O_CLOEXEC));
    pid_t child = SYS(fork());
    if (child == 0) {
        close(hands[1]);
        if (chroot("root") != 0 || write(ready[1], "r", 1) != 1)
            _exit(1);
        _exit(read(hands[0], &byte, 1) == 0 ? 0 : 1);
    }
    close(hands[0]);
    TRUE(read(ready[0], &byte, 1) == 1);
    int proc = SYS(open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC));
    TRUE(OK(tuck_find_holders(proc, 0, 1, &id, 1, NULL, 0, found, 16, &unseen)) == 1);
    TRUE(found[0].kind == TUCK_HOLD_ROOT && found[0].pid == child && found[0].mount_id == id);
    close(proc);
    close(hands[1]);
    SYS(waitpid(child, NULL, 0));
    close(ready[0]);
    close(ready[1]);
    OK(tuck_umount2("root", 0));
    SYS(rmdir("root"));
}

struct look {
    int how;
    const char *path;
    const char *const *expected;
    size_t count;
    uint32_t good;
    struct tuck_counts counts;
};

static void *look(void *argument) {
    struct look *look = argument;
    OK(tuck_watch(look->how, look->path, look->expected, look->count, look->good, &look->counts));
    return NULL;
}

static void watch(int how, const char *path, const char *const *expected, size_t count, struct tuck_counts *ret) {
    struct look order = {how, path, expected, count, 1, {0}};
    pthread_t thread;
    TRUE(pthread_create(&thread, NULL, look, &order) == 0);
    while (__atomic_load_n(&order.counts.ready, __ATOMIC_ACQUIRE) == 0)
        usleep(1000);
    usleep(5000);
    __atomic_store_n(&order.counts.stop, 1, __ATOMIC_RELEASE);
    TRUE(pthread_join(thread, NULL) == 0);
    *ret = order.counts;
    TRUE(ret->looks > 0);
}

static void looking(void) {
    struct tuck_counts counts;
    const char *const nine[9] = {"", "", "", "", "", "", "", "", ""};
    memset(&counts, 0, sizeof counts);
    FAILS(tuck_watch(-1, ".", nine, 1, 0, &counts), EINVAL);
    FAILS(tuck_watch(4, ".", nine, 1, 0, &counts), EINVAL);
    FAILS(tuck_watch(TUCK_WATCH_READ, ".", nine, 9, 0, &counts), EINVAL);
    counts.stop = 1;
    OK(tuck_watch(TUCK_WATCH_READ, ".", nine, 8, 0, &counts));
    TRUE(counts.looks == 0);

    SYS(mkdir("watched", 0755));
    write_file("watched/b", "text", 0644);
    write_file("watched/a", "", 0644);
    watch(TUCK_WATCH_READ, "watched/b", (const char *const[]){"text"}, 1, &counts);
    TRUE(counts.seen[0] == counts.looks && counts.errors == 0 && counts.other == 0);
    TRUE(counts.longest_absence_ns == 0);
    watch(TUCK_WATCH_STAT, "watched/b", (const char *const[]){"9", "4"}, 2, &counts);
    TRUE(counts.seen[1] == counts.looks && counts.seen[0] == 0);
    watch(TUCK_WATCH_READDIR, "watched", (const char *const[]){"a b"}, 1, &counts);
    TRUE(counts.seen[0] == counts.looks);
    watch(TUCK_WATCH_EXECVE, "/bin/true", (const char *const[]){"0"}, 1, &counts);
    TRUE(counts.seen[0] == counts.looks);
    watch(TUCK_WATCH_READ, "watched/b", (const char *const[]){"else"}, 1, &counts);
    TRUE(counts.other == counts.looks && strcmp(counts.sample, "text") == 0);
    for (int how = TUCK_WATCH_READ; how <= TUCK_WATCH_EXECVE; how++) {
        watch(how, "watched/absent", (const char *const[]){"text"}, 1, &counts);
        TRUE(counts.errors == counts.looks && counts.last_errno == ENOENT);
    }
    watch(TUCK_WATCH_READ, "watched", (const char *const[]){"text"}, 1, &counts);
    TRUE(counts.errors == counts.looks && counts.last_errno == EISDIR);
    /* As many and as long names as there is no room for. */
    for (int i = 0; i < 80; i++) {
        char name[300];
        snprintf(name, sizeof name, "watched/%0240d", i);
        write_file(name, "", 0644);
    }
    watch(TUCK_WATCH_READDIR, "watched", (const char *const[]){"a b"}, 1, &counts);
    TRUE(counts.other == counts.looks);
}

static void *make_absence(void *argument) {
    for (int i = 0; i < 20; i++) {
        SYS(rename("watched/b", "watched/away"));
        usleep(2000);
        SYS(rename("watched/away", "watched/b"));
        usleep(2000);
    }
    __atomic_store_n((uint32_t *)argument, 1, __ATOMIC_RELEASE);
    return NULL;
}

static void absence_is_measured(void) {
    const char *const expected[] = {"text"};
    struct tuck_counts counts;
    pthread_t thread;
    memset(&counts, 0, sizeof counts);
    TRUE(pthread_create(&thread, NULL, make_absence, &counts.stop) == 0);
    OK(tuck_watch(TUCK_WATCH_READ, "watched/b", expected, 1, 1, &counts));
    TRUE(pthread_join(thread, NULL) == 0);
    TRUE(counts.seen[0] > 0 && counts.errors > 0 && counts.last_errno == ENOENT);
    TRUE(counts.longest_absence_ns >= 1000000);
}

static void pausing(void) {
    const char *const expected[] = {"text"};
    struct look order = {TUCK_WATCH_READ, "watched/b", expected, 1, 1, {.pause_us = 20000}};
    pthread_t thread;
    TRUE(pthread_create(&thread, NULL, look, &order) == 0);
    usleep(50000);
    __atomic_store_n(&order.counts.stop, 1, __ATOMIC_RELEASE);
    TRUE(pthread_join(thread, NULL) == 0);
    TRUE(order.counts.looks > 0 && order.counts.looks <= 4);
}

static void ending_with_the_parent(void) {
    int set = 0;
    FAILS(tuck_end_with_parent(-1), EINVAL);
    OK(tuck_end_with_parent(SIGTERM));
    SYS(prctl(PR_GET_PDEATHSIG, &set));
    TRUE(set == SIGTERM);
    OK(tuck_end_with_parent(SIGKILL));
}

int main(int count, char **arguments) {
    if (count == 3 && strcmp(arguments[1], "--hold") == 0)
        return hold(arguments[2]);
    TRUE(count == 2);
    OK(tuck_end_with_parent(SIGKILL));
    SYS(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL));
    SYS(chdir(arguments[1]));
    mount_tmpfs(".");
    SYS(chdir(arguments[1]));
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    privileged = control >= 0;
    if (privileged)
        close(control);
    int before = open_descriptors();

    filesystem_contexts();
    reconfiguring();
    overlay_by_descriptors();
    trees();
    the_swap();
    what_is_mounted();
    unmounts_in_turn();
    many_mounts();
    processes();
    replacements(arguments[1]);
    replacements_everywhere(arguments[1]);
    namespaces();
    loop_failures();
    bool all = true;
    if (privileged) {
        loop_devices();
        all = cloned_files();
    }
    holders();
    root_holder();
    looking();
    absence_is_measured();
    pausing();
    ending_with_the_parent();

    TRUE(open_descriptors() == before);
    return all ? 0 : SKIPPED;
}
