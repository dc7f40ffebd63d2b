/* SPDX-License-Identifier: Apache-2.0 */
/* The system calls of a swap and nothing around them: what a swap costs at least.
 *
 *   bare swap TARGET STATE     for each line, the path of an erofs image: swaps TARGET to it, brings the
 *                              namespaces that did not follow, prints the microseconds of each phase and
 *                              the number of mounts found at the end. After a "!" it takes the new content
 *                              out again instead of showing it
 *   bare hold COUNT [private]  keeps COUNT copies of this mount namespace, peers of it or private, with a
 *                              process in each, until its input ends
 *   bare open COUNT FDS EVERY FILE  keeps COUNT processes with FDS descriptors each, until its input ends; every
 *                              EVERYth has FILE open
 *   bare walk TARGET           for each line, looks at every mount of every namespace, prints the microseconds
 *                              that took, and the number of mounts of TARGET's filesystem */
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    F_EMPTY_PATH = 0x4,
    T_EMPTY_PATH = 0x40,
    SET_GROUP = 0x100,
    BENEATH = 0x200,
    CLONE_TREE = 0x1,
    CLOEXEC_TREE = 02000000,
    EMPTY_PATH = 0x1000,
    NO_SYMLINKS = 0x4,
    ALL_FACTS = 0x27f,
    FEW_FACTS = 0x3,
    RDONLY_NODEV_NOSUID = 0x7,
    MAKE_PRIVATE = 1 << 18,
    WHOLE = 0x8000,
    DETACH = 0x2,
    NOFOLLOW = 0x8,
    ROOM = 512,
    AT_ONCE = 128,
};

enum { LOOK, IMAGES, ASSEMBLE, TUCK, VERIFY, REVEAL, CHECK, CONVERGE, RECORD, UNDO, PHASES };

struct info {
    uint32_t size;
    uint32_t mounts;
    uint64_t id;
};

#define INFO _IOR(0xb7, 10, struct info)
#define NEXT _IOR(0xb7, 11, struct info)
#define PREV _IOR(0xb7, 12, struct info)
#define OWNER _IO(0xb7, 1)

struct found {
    uint64_t id, parent, space, above, owner;
    bool is_new;
};

static struct found *founds;
static size_t found_count, found_room;

/* No mount that is looked for has a lower id; 0 where that is not known. */
static uint64_t first;

/* Whether it is the first look, which asks more. */
static bool is_first;

static int must(int value, const char *what) {
    if (value < 0) {
        fprintf(stderr, "bare: %s: %s\n", what, strerror(-value));
        exit(1);
    }
    return value;
}

static int ok(int value, const char *what) {
    return must(value < 0 ? -errno : value, what);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec / 1e3;
}

static uint64_t mount_of(int directory, const char *path) {
    uint64_t id;
    must(tuck_mount_id(directory, path, *path ? 0x100 : EMPTY_PATH, &id), "statx");
    return id;
}

union facts {
    struct tuck_statmount mount;
    char room[4096];
};

static void facts_of(uint64_t id, union facts *ret_facts) {
    must(tuck_statmount(id, 0, ALL_FACTS, &ret_facts->mount, sizeof *ret_facts), "statmount");
}

static bool same(const struct tuck_statmount *mount, const struct tuck_statmount *other) {
    return other != NULL && mount->sb_dev_major == other->sb_dev_major && mount->sb_dev_minor == other->sb_dev_minor;
}

static void look_into(uint64_t space, const struct tuck_statmount *new, const struct tuck_statmount *old) {
    uint64_t ids[ROOM], earlier = first > 0 ? first - 1 : 0, after = earlier;
    for (;;) {
        struct tuck_statmount mount;
        int64_t count = tuck_listmount(UINT64_MAX, space, after, ids, ROOM);
        for (int64_t i = 0; i < count; i++) {
            if (tuck_statmount(ids[i], space, FEW_FACTS, &mount, sizeof mount) < 0)
                continue;
            bool is_new = same(&mount, new);
            if (!is_new && !same(&mount, old))
                continue;
            if (found_count == found_room) {
                found_room = 2 * found_room + 64;
                founds = realloc(founds, found_room * sizeof *founds);
                if (founds == NULL)
                    must(-ENOMEM, "realloc");
            }
            struct found *found = &founds[found_count++];
            *found =
                (struct found){.id = mount.mnt_id, .parent = mount.mnt_parent_id, .space = space, .is_new = is_new};
            if (is_first && !is_new)
                tuck_listmount(mount.mnt_id, space, earlier, &found->above, 1);
        }
        if (count < ROOM)
            return;
        after = ids[count - 1];
    }
}

/* Whose a namespace is: there, new has to be kept from another user namespace's root. */
static void ask_owner(int space, size_t from) {
    struct stat status;
    if (from == found_count)
        return;
    int owner = ok(ioctl(space, OWNER), "NS_GET_USERNS");
    ok(fstat(owner, &status), "fstat");
    close(owner);
    for (size_t i = from; i < found_count; i++)
        founds[i].owner = status.st_ino;
}

static void look_towards(int own, unsigned long direction, const struct tuck_statmount *new,
                         const struct tuck_statmount *old) {
    int here = own;
    for (;;) {
        struct info info = {.size = sizeof info};
        struct stat status;
        int next = ioctl(here, direction, &info);
        if (here != own)
            close(here);
        if (next < 0)
            return;
        size_t before = found_count;
        look_into(info.id, new, old);
        if (is_first) {
            ok(fstat(next, &status), "fstat");
            ask_owner(next, before);
        }
        here = next;
    }
}

static size_t look_everywhere(const struct tuck_statmount *new, const struct tuck_statmount *old) {
    struct info info = {.size = sizeof info};
    int own = ok(open("/proc/thread-self/ns/mnt", O_RDONLY | O_CLOEXEC), "open");
    found_count = 0;
    ok(ioctl(own, INFO, &info), "NS_MNT_GET_INFO");
    look_into(info.id, new, old);
    look_towards(own, PREV, new, old);
    look_towards(own, NEXT, new, old);
    close(own);
    return found_count;
}

static void look_back(const struct tuck_statmount *new, const struct tuck_statmount *old) {
    is_first = true;
    look_everywhere(new, old);
    is_first = false;
    for (size_t i = 0; i < found_count; i++)
        if (founds[i].above != 0)
            must(-EBUSY, "something is mounted on old");
}

static int by_id(const void *left, const void *right) {
    uint64_t a = ((const struct found *)left)->id, b = ((const struct found *)right)->id;
    return a < b ? -1 : a > b;
}

/* Arrival: the parent of each copy of old is a copy of new. Returns how many did not get it. */
static size_t see_arrival(void) {
    size_t stale = 0;
    qsort(founds, found_count, sizeof *founds, by_id);
    for (size_t i = 0; i < found_count; i++) {
        const struct found *parent;
        if (founds[i].is_new)
            continue;
        parent = bsearch(&(struct found){.id = founds[i].parent}, founds, found_count, sizeof *founds, by_id);
        stale += parent == NULL || !parent->is_new;
    }
    return stale;
}

static int by_space(const void *left, const void *right) {
    uint64_t a = ((const struct found *)left)->space, b = ((const struct found *)right)->space;
    return a < b ? -1 : a > b;
}

struct stray {
    int space, clone;
};

static void bring(struct stray *strays, size_t count, int home, int mount, const char *target) {
    for (size_t i = 0; i < count; i++)
        strays[i].clone =
            must(tuck_open_tree_attr(mount, "", CLONE_TREE | CLOEXEC_TREE | EMPTY_PATH, 0, 0, MAKE_PRIVATE, 0),
                 "open_tree_attr");
    for (size_t i = 0; i < count; i++) {
        must(tuck_setns(strays[i].space, CLONE_NEWNS), "setns");
        must(tuck_move_mount(strays[i].clone, "", AT_FDCWD, target, F_EMPTY_PATH | BENEATH), "move_mount");
        must(tuck_umount2(target, NOFOLLOW), "umount2");
        close(strays[i].clone);
        close(strays[i].space);
    }
    must(tuck_setns(home, CLONE_NEWNS), "setns");
}

/* Opens the namespaces in which old was found, and brings them. */
static void converge(int mount, const char *target) {
    const unsigned long directions[] = {PREV, NEXT};
    struct stray strays[AT_ONCE];
    size_t count = 0;
    int home = ok(open("/proc/thread-self/ns/mnt", O_RDONLY | O_CLOEXEC), "open");
    qsort(founds, found_count, sizeof *founds, by_space);
    for (size_t i = 0; i < 2; i++) {
        int here = ok(fcntl(home, F_DUPFD_CLOEXEC, 0), "fcntl");
        for (;;) {
            struct info info = {.size = sizeof info};
            int next = ioctl(here, directions[i], &info);
            close(here);
            if (next < 0)
                break;
            here = next;
            if (bsearch(&(struct found){.space = info.id}, founds, found_count, sizeof *founds, by_space) == NULL)
                continue;
            strays[count++].space = ok(fcntl(next, F_DUPFD_CLOEXEC, 0), "fcntl");
            if (count == AT_ONCE) {
                bring(strays, count, home, mount, target);
                count = 0;
            }
        }
    }
    bring(strays, count, home, mount, target);
    close(home);
}

static double spent[PHASES], since;

static void enter(int phase) {
    static int current;
    double time = now();
    spent[current] += time - since;
    current = phase;
    since = time;
}

static void write_durably(int state, const char *name) {
    static const char text[600] = "a record";
    int file = ok(openat(state, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600), "open");
    ok((int)write(file, text, sizeof text), "write");
    ok(fsync(file), "fsync");
    close(file);
}

static void rename_durably(int state, const char *from, const char *to) {
    ok(renameat(state, from, state, to), "rename");
    ok(fsync(state), "fsync");
}

static int mount_image(int image) {
    char source[64];
    int context = must(tuck_fsopen("erofs", 1), "fsopen");
    snprintf(source, sizeof source, "/proc/self/fd/%d", image);
    must(tuck_fsconfig_set_string(context, "source", source), "fsconfig");
    must(tuck_fsconfig_set_flag(context, "ro"), "fsconfig");
    must(tuck_fsconfig_create(context), "fsconfig");
    int mount = must(tuck_fsmount(context, 1, 1), "fsmount");
    close(context);
    return mount;
}

static int mount_overlay(int image, int base) {
    static const char *const options[][2] = {
        {"source", "bare"}, {"redirect_dir", "nofollow"}, {"metacopy", "off"}, {"index", "off"}, {"nfs_export", "off"}};
    int context = must(tuck_fsopen("overlay", 1), "fsopen");
    for (size_t i = 0; i < sizeof options / sizeof options[0]; i++)
        must(tuck_fsconfig_set_string(context, options[i][0], options[i][1]), "fsconfig");
    must(tuck_fsconfig_set_fd(context, "lowerdir+", image), "fsconfig");
    must(tuck_fsconfig_set_fd(context, "lowerdir+", base), "fsconfig");
    must(tuck_fsconfig_create(context), "fsconfig");
    int mount = must(tuck_fsmount(context, 1, RDONLY_NODEV_NOSUID), "fsmount");
    close(context);
    return mount;
}

/* Takes new out from beneath old, in a copy of the namespace from which it propagates. */
static void undo(int mount, int parent, const char *name, uint64_t top, uint64_t identity) {
    union facts old;
    int home = ok(open("/proc/thread-self/ns/mnt", O_RDONLY | O_CLOEXEC), "open");
    ok(fchdir(mount), "fchdir");
    ok(unshare(CLONE_NEWNS), "unshare");
    int here = ok(open(".", O_PATH | O_CLOEXEC), "open");
    must(tuck_mount_setattr(here, "", EMPTY_PATH, 0, 0, MAKE_PRIVATE, 0), "mount_setattr");
    ok(chdir(".."), "chdir");
    must(tuck_mount_setattr(AT_FDCWD, name, WHOLE, 0, 0, MAKE_PRIVATE, 0), "mount_setattr");
    must(tuck_umount2(name, DETACH | NOFOLLOW), "umount2");
    must(tuck_move_mount(mount, "", here, "", F_EMPTY_PATH | T_EMPTY_PATH | SET_GROUP), "move_mount");
    close(here);
    must(tuck_umount2(name, DETACH | NOFOLLOW), "umount2");
    must(tuck_setns(home, CLONE_NEWNS), "setns");
    close(home);
    facts_of(top, &old);
    if (mount_of(parent, name) != top || old.mount.mnt_parent_id == identity)
        must(-EBUSY, "new is still there");
}

static void swap(const char *folder, const char *name, int state, const char *path) {
    const bool undone = *path == '!';
    path += undone;
    char head[4096], place[300], target[300];
    uint64_t ids[ROOM];
    struct stat status;
    union facts around, old, new;
    double begun;

    memset(spent, 0, sizeof spent);
    since = begun = now();
    enter(LOOK);
    int parent = must(tuck_openat2(AT_FDCWD, folder, O_PATH | O_DIRECTORY | O_CLOEXEC, 0, NO_SYMLINKS), "openat2");
    uint64_t below = mount_of(parent, ""), top = mount_of(parent, name);
    bool covered = top != below;
    facts_of(below, &around);
    facts_of(top, &old);

    enter(IMAGES);
    int file = ok(open(path, O_RDONLY | O_CLOEXEC), "open");
    ok(fstat(file, &status), "fstat");
    ok((int)pread(file, head, sizeof head, 0), "pread");

    enter(ASSEMBLE);
    if (covered)
        tuck_listmount(top, 0, 0, ids, ROOM);
    int tree = must(tuck_open_tree(parent, "", CLONE_TREE | CLOEXEC_TREE | EMPTY_PATH), "open_tree");
    int base = must(tuck_openat2(tree, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0, NO_SYMLINKS), "openat2");
    int image = mount_image(file), mount = mount_overlay(image, base);
    uint64_t identity = mount_of(mount, "");
    write_durably(state, "pending.new");
    rename_durably(state, "pending.new", "pending");
    write_durably(state, "generation.new");
    write_durably(state, "current.new");

    enter(TUCK);
    /* As soon as old is gone, its device number is anyone's. */
    int picked =
        covered ? must(tuck_fspick(parent, name, 1), "fspick") : ok(fcntl(parent, F_DUPFD_CLOEXEC, 0), "fcntl");
    must(tuck_move_mount(mount, "", parent, name, F_EMPTY_PATH | (covered ? BENEATH : 0)), "move_mount");

    enter(VERIFY);
    if (mount_of(parent, "") != below || mount_of(parent, name) != (covered ? top : identity))
        must(-EBUSY, "another mount is seen");
    facts_of(identity, &new);
    if (covered) {
        facts_of(top, &old);
        if (old.mount.mnt_parent_id != identity)
            must(-EBUSY, "new is not beneath old");
    }
    look_back(&new.mount, covered ? &old.mount : NULL);
    size_t stale = see_arrival();

    enter(REVEAL);
    snprintf(place, sizeof place, "/proc/self/fd/%d/%s", parent, name);
    size_t count = found_count;
    if (undone) {
        enter(UNDO);
        undo(mount, parent, name, top, identity);
        goto end;
    }
    if (covered)
        must(tuck_umount2(place, NOFOLLOW), "umount2");

    enter(CHECK);
    if (mount_of(parent, name) != identity)
        must(-EBUSY, "another mount is seen");
    facts_of(identity, &new);
    count = look_everywhere(&new.mount, covered ? &old.mount : NULL);
    if (stale > 0) {
        size_t kept = 0;
        for (size_t i = 0; i < count; i++)
            if (!founds[i].is_new)
                founds[kept++] = founds[i];
        found_count = kept;
        snprintf(target, sizeof target, "%s/%s", folder, name);

        enter(CONVERGE);
        converge(mount, target);

        enter(CHECK);
        count = look_everywhere(&new.mount, &old.mount);
    }
    for (size_t i = 0; i < count; i++)
        if (!founds[i].is_new)
            must(-EBUSY, "old is still seen");

    enter(RECORD);
    rename_durably(state, "generation.new", "generation");
    rename_durably(state, "current.new", "current");

    first = identity;
end:
    enter(LOOK);
    const int opened[] = {parent, file, tree, base, image, mount, picked};
    for (size_t i = 0; i < sizeof opened / sizeof opened[0]; i++)
        close(opened[i]);
    for (int phase = 0; phase < PHASES; phase++)
        printf("%.1f ", spent[phase]);
    printf("%.1f %zu\n", now() - begun, count);
    fflush(stdout);
}

static void copy_namespace(bool private) {
    ok(unshare(CLONE_NEWNS), "unshare");
    if (private)
        must(tuck_mount_setattr(AT_FDCWD, "/", WHOLE, 0, 0, MAKE_PRIVATE, 0), "mount_setattr");
}

static void fill(int descriptors, const char *path) {
    for (int fd = 0; fd < descriptors; fd++) {
        int file = ok(open(fd > 0 ? "/dev/null" : path, O_RDONLY), "open");
        if (file != fd) {
            ok(dup2(file, fd), "dup2");
            close(file);
        }
    }
}

/* What each of the processes that are kept is: one in a copy of the namespace, or one with many descriptors. */
struct kept {
    bool private;
    int descriptors;
    long every;
    const char *path;
};

static void keep(long count, const struct kept *kept) {
    pid_t *children = calloc((size_t)count + 1, sizeof *children);
    int pipes[2];
    char byte;
    if (children == NULL)
        must(-ENOMEM, "calloc");
    ok(pipe(pipes), "pipe");
    for (long i = 0; i < count; i++) {
        children[i] = ok(fork(), "fork");
        if (children[i] == 0) {
            ok(prctl(PR_SET_PDEATHSIG, SIGKILL), "prctl");
            int told = ok(fcntl(pipes[1], F_DUPFD_CLOEXEC, kept->descriptors), "fcntl");
            if (kept->descriptors == 0)
                copy_namespace(kept->private);
            fill(kept->descriptors, i % kept->every == 0 ? kept->path : "/dev/null");
            ok((int)write(told, "", 1), "write");
            for (;;)
                pause();
        }
    }
    for (long i = 0; i < count; i++)
        ok((int)read(pipes[0], &byte, 1), "read");
    puts("ready");
    fflush(stdout);
    while (getchar() != EOF)
        ;
    for (long i = 0; i < count; i++)
        kill(children[i], SIGKILL);
    while (waitpid(-1, NULL, 0) > 0 || errno == EINTR)
        ;
    free(children);
}

/* One walk over everything: the least that it takes to know who has a filesystem mounted. */
static void walk(const char *target) {
    union facts top;
    double begun = now();
    facts_of(mount_of(AT_FDCWD, target), &top);
    size_t count = look_everywhere(&top.mount, NULL);
    printf("%.1f %zu\n", now() - begun, count);
    fflush(stdout);
}

int main(int count, char **words) {
    char line[4096];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if ((count == 3 || count == 4) && strcmp(words[1], "hold") == 0) {
        keep(strtol(words[2], NULL, 10), &(struct kept){.private = count == 4, .every = 1});
        return 0;
    }
    if (count == 6 && strcmp(words[1], "open") == 0) {
        const struct kept kept = {
            .descriptors = (int)strtol(words[3], NULL, 10), .every = strtol(words[4], NULL, 10), .path = words[5]};
        keep(strtol(words[2], NULL, 10), &kept);
        return 0;
    }
    if (count == 3 && strcmp(words[1], "walk") == 0) {
        while (fgets(line, sizeof line, stdin) != NULL)
            walk(words[2]);
        free(founds);
        return 0;
    }
    char *name = count == 4 && strcmp(words[1], "swap") == 0 ? strrchr(words[2], '/') : NULL;
    if (name == NULL) {
        fputs("usage: bare swap TARGET STATE | bare hold COUNT [private] | bare open COUNT FDS EVERY FILE | bare walk "
              "TARGET\n",
              stderr);
        return 2;
    }
    *name++ = '\0';
    int state = ok(open(words[3], O_RDONLY | O_DIRECTORY | O_CLOEXEC), "open");
    while (fgets(line, sizeof line, stdin) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        swap(words[2], name, state, line);
    }
    free(founds);
    close(state);
    return 0;
}
