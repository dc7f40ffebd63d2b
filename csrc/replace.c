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
    MNT_ROOT = 8,
    MNT_POINT = 16,
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

/* A mount with what can be said of it in words. */
union told {
    struct tuck_statmount mount;
    char room[sizeof(struct tuck_statmount) + 2 * PATH_MAX];
};

static const char *root_of(const union told *told) {
    return told->mount.str + told->mount.mnt_root;
}

static const char *place_of(const union told *told) {
    return told->mount.str + told->mount.mnt_point;
}

static int look(uint64_t mount_id, union told *ret_told) {
    const uint64_t all = SB_BASIC | MNT_BASIC | MNT_ROOT | MNT_POINT;
    int error = tuck_statmount(mount_id, 0, all, &ret_told->mount, sizeof *ret_told);
    return error < 0 ? error : (ret_told->mount.mask & all) == all ? 0 : -ESTALE; /* out of the caller's sight */
}

/* Where something is told, and how much of that is used. */
struct text {
    char *words;
    size_t size;
    size_t used;
    uint32_t last;
};

/* Most receivers are alike: what was said of the one before is not said again. */
static int tell(struct text *text, const union told *mount, const union told *around, uint32_t *ret_words) {
    const char *const words[] = {root_of(around), place_of(around), place_of(mount)};
    size_t length = 0, same = 0;
    if (text == NULL)
        return 0;
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        const size_t more = strlen(words[i]) + 1;
        if (same == length && text->last + length + more <= text->used &&
            memcmp(text->words + text->last + length, words[i], more) == 0)
            same += more;
        length += more;
    }
    if (same < length) {
        if (length > text->size - text->used)
            return -EOVERFLOW;
        text->last = (uint32_t)text->used;
        for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
            const size_t more = strlen(words[i]) + 1;
            memcpy(text->words + text->used, words[i], more);
            text->used += more;
        }
    }
    *ret_words = text->last;
    return 0;
}

/* The directory in which a mount lies, and the last name of its place. */
struct spot {
    int folder;
    char name[NAME_MAX + 1];
};

static int open_spot(const char *place, struct spot *ret_spot) {
    char folder[PATH_MAX];
    const char *slash = strrchr(place, '/');
    if (slash == NULL || slash[1] == '\0')
        return -EINVAL; /* the root */
    size_t length = (size_t)(slash - place) + 1;
    if (length >= sizeof folder || strlen(slash + 1) >= sizeof ret_spot->name)
        return -ENAMETOOLONG;
    memcpy(folder, place, length);
    folder[length] = '\0';
    strcpy(ret_spot->name, slash + 1);
    ret_spot->folder = walk(AT_FDCWD, folder);
    return ret_spot->folder < 0 ? ret_spot->folder : 0;
}

/* Opens the mount, which has to be what is seen there. No more than one name is looked up, in a directory that is open:
 * nobody can put anything in the way. */
static int reach(const struct tuck_replacement *wanted, const struct spot *spot) {
    uint64_t found;
    int fd = walk(spot->folder, spot->name);
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

static int refuse_others(const struct tuck_replacement *wanted, const union told *mount, const union told *around) {
    if (mount->mount.mnt_parent_id != wanted->parent_id || around->mount.mnt_peer_group != 0)
        return -ESTALE;
    if (wanted->root != NULL && strcmp(wanted->root, root_of(mount)) != 0)
        return -ESTALE;
    if (wanted->around.major == wanted->device.major && wanted->around.minor == wanted->device.minor)
        return -EEXIST;
    return 0;
}

static int refuse_covered(const struct tuck_replacement *wanted) {
    uint64_t above;
    int64_t count = tuck_listmount(wanted->mount_id, 0, 0, &above, 1);
    return count < 0 ? (int)count : count > 0 ? -EBUSY : 0;
}

static int put_beneath(const struct tuck_replacement *wanted, const struct spot *spot) {
    int seen = reach(wanted, spot);
    if (seen < 0)
        return seen;
    int error = refuse_covered(wanted);
    if (error == 0)
        error = tuck_move_mount(wanted->clone, "", seen, "", MOVE_F_EMPTY_PATH | MOVE_T_EMPTY_PATH | MOVE_BENEATH);
    close(seen);
    return error;
}

static int take_off(const struct tuck_replacement *wanted, const struct spot *spot) {
    struct tuck_statmount mount;
    int seen = reach(wanted, spot);
    if (seen < 0)
        return seen;
    close(seen);
    if (fchdir(spot->folder) < 0)
        return -errno;
    int error = tuck_umount2(spot->name, UMOUNT_NOFOLLOW);
    if (error < 0)
        return error;
    return tuck_statmount(wanted->mount_id, 0, MNT_BASIC, &mount, sizeof mount) == -ENOENT ? 0 : -ESTALE;
}

static int exchange(struct tuck_replacement *wanted, const struct spot *spot) {
    int error = put_beneath(wanted, spot);
    wanted->placed = error == 0;
    return error < 0 ? error : take_off(wanted, spot);
}

static int replace(struct tuck_replacement *wanted, struct text *text) {
    union told mount, around;
    struct spot spot;
    wanted->placed = 0;
    int error = tuck_setns(wanted->space, CLONE_NEWNS);
    if (error == 0)
        error = look(wanted->mount_id, &mount);
    if (error == 0)
        error = look(wanted->parent_id, &around);
    if (error < 0)
        return error;
    wanted->around = (struct tuck_dev){around.mount.sb_dev_major, around.mount.sb_dev_minor};
    error = refuse_others(wanted, &mount, &around);
    if (error == 0)
        error = tell(text, &mount, &around, &wanted->words);
    if (error == 0)
        error = open_spot(place_of(&mount), &spot);
    if (error < 0)
        return error;
    error = exchange(wanted, &spot);
    close(spot.folder);
    return error;
}

void tuck_replace(struct tuck_replacement *replacements, size_t count) {
    for (size_t i = 0; i < count; i++)
        replacements[i].error = replace(&replacements[i], NULL);
}

/* What is to be replaced next, each with its namespace open. Clones can be made in home only: some at a time, since
 * there may be few descriptors, and not one by one, since one has to go there for it. */
struct search {
    int home;
    int source;
    struct tuck_replacement *replacements;
    size_t count;
    struct text text;
    struct tuck_replacement *next[8];
    size_t next_count;
};

static int make_clone(int source, struct tuck_replacement *one) {
    int clone = tuck_open_tree_attr(source, "", CLONE_TREE | O_CLOEXEC | EMPTY_PATH_, 0, 0, MS_PRIVATE, 0);
    if (clone < 0)
        return clone;
    one->clone = clone;
    return tuck_mount_id(clone, "", EMPTY_PATH_, &one->clone_id);
}

static void replace_next(struct search *search) {
    int error = search->next_count > 0 ? tuck_setns(search->home, CLONE_NEWNS) : 0;
    for (size_t i = 0; i < search->next_count; i++)
        search->next[i]->error = error < 0 ? error : make_clone(search->source, search->next[i]);
    for (size_t i = 0; i < search->next_count; i++) {
        struct tuck_replacement *one = search->next[i];
        if (one->error == 0)
            one->error = replace(one, &search->text);
        close(one->space);
        one->space = -1;
        if (one->clone >= 0 && (one->error == 0 || !one->placed)) {
            close(one->clone);
            one->clone = -1;
        }
    }
    search->next_count = 0;
}

static void replace_in(struct search *search, int space, uint64_t id) {
    size_t low = 0, high = search->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (search->replacements[middle].namespace_id < id)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < search->count && search->replacements[low].namespace_id == id; low++) {
        struct tuck_replacement *one = &search->replacements[low];
        one->space = fcntl(space, F_DUPFD_CLOEXEC, 0);
        one->error = one->space < 0 ? -errno : 0;
        if (one->space >= 0)
            search->next[search->next_count++] = one;
        if (search->next_count == sizeof search->next / sizeof search->next[0])
            replace_next(search);
    }
}

static int replace_towards(struct search *search, int (*step)(int, uint64_t *)) {
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

int tuck_replace_everywhere(int home, int source, struct tuck_replacement *replacements, size_t count, char *ret_text,
                            size_t size) {
    struct search search = {.home = home, .source = source, .replacements = replacements, .count = count};
    uint64_t own;
    int left, error = tuck_namespace_id(home, &own);
    if (error < 0)
        return error;
    search.text = (struct text){.words = ret_text, .size = size};
    for (size_t i = 0; i < count; i++) {
        replacements[i].space = replacements[i].clone = -1;
        replacements[i].placed = 0;
        replacements[i].error = -ESRCH;
    }
    replace_in(&search, home, own);
    error = replace_towards(&search, tuck_namespace_after);
    if (error == 0)
        error = replace_towards(&search, tuck_namespace_before);
    replace_next(&search);
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
