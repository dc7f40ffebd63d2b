/* SPDX-License-Identifier: Apache-2.0 */
/* What others have a hand in, at random: the text in /proc, and what statmount and listmount tell.
 *
 * TUCKCTL_FUZZ_SEED and TUCKCTL_FUZZ_EXAMPLES say which and how many; the seed is printed. The sanitizers judge. */
#include "floor.h"

#include "check.h"
#include <dlfcn.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { NR_STATMOUNT = 457, NR_LISTMOUNT = 458, MOST = 8 };

static uint64_t state;
static bool invent;

/* xorshift64: the same numbers everywhere. */
static uint64_t any(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static size_t below(size_t limit) {
    return (size_t)(any() % limit);
}

static long any_statmount(unsigned char *buffer, size_t size) {
    static const int errors[] = {0, 0, 0, 0, ENOENT, EPERM, EOVERFLOW, EIO};
    int error = errors[below(8)];
    for (size_t i = 0; i < size; i++)
        buffer[i] = (unsigned char)(any() >> 56);
    struct tuck_statmount *mount = (struct tuck_statmount *)(void *)buffer;
    mount->sb_dev_major = (uint32_t)below(3);
    mount->sb_dev_minor = (uint32_t)below(3);
    errno = error;
    return error == 0 ? 0 : -1;
}

static long any_listmount(uint64_t *ids, size_t count) {
    if (below(8) == 0) {
        errno = below(2) ? ENOENT : EPERM;
        return -1;
    }
    size_t found = below(4) == 0 && count > 0 ? count : below(count + 1);
    for (size_t i = 0; i < found; i++)
        ids[i] = any();
    /* A list that never ends is none that the kernel gives. */
    return (long)(found == count && below(4) != 0 && found > 0 ? found - 1 : found);
}

/* Takes the place of the C library's. */
long syscall(long number, ...) {
    long argument[6];
    va_list all;
    va_start(all, number);
    for (int i = 0; i < 6; i++)
        argument[i] = va_arg(all, long);
    va_end(all);
    if (invent && number == NR_STATMOUNT)
        return any_statmount((unsigned char *)argument[1], (size_t)argument[2]);
    if (invent && number == NR_LISTMOUNT)
        return any_listmount((uint64_t *)argument[1], (size_t)argument[2]);
    static long (*real)(long, ...);
    if (real == NULL)
        *(void **)(&real) = dlsym(RTLD_NEXT, "syscall");
    return real(number, argument[0], argument[1], argument[2], argument[3], argument[4], argument[5]);
}

/* One byte more is seen by the sanitizer. */
static void *exactly(size_t count, size_t size) {
    void *room = malloc(count * size);
    TRUE(room != NULL);
    return room;
}

static void look_for_mounts(void) {
    struct tuck_namespace spaces[4] = {{.id = 1}, {.id = 2}, {.id = 3}, {.id = 4}};
    struct tuck_dev devices[2] = {{1, 1}, {2, 2}};
    size_t unseen = 0, room = below(MOST + 1);
    struct tuck_match *matches = exactly(room, sizeof *matches);
    invent = true;
    int64_t found = tuck_find_mounts(spaces, below(5), any(), devices, below(3), matches, room, &unseen);
    invent = false;
    free(matches);
    TRUE(found >= 0);
    TRUE(unseen <= 4);
}

/* Words as they stand in maps, fdinfo and status, and others. */
static size_t any_text(char *text, size_t size) {
    static const char *const words[] = {"7f00-7f01 r--p 0 00:2a 12 /a",
                                        "ffffffffffffffffff-1 r--p 0 ffffffffff:1 99999999999999999999 x",
                                        "-",
                                        "inotify ",
                                        "inotify wd:1 ino:2 sdev:2a mask:1",
                                        "sdev:",
                                        "sdev:ffffffffffffffff",
                                        "\nNSpid:\t1\n",
                                        "\nNSpid:\t",
                                        "\n",
                                        "\t",
                                        "\xff\x1b[2J",
                                        "%n%s",
                                        " 00:00 ",
                                        "0:1 1",
                                        "CapEff:\t",
                                        "inotify sdev:1",
                                        "7f00-7f01",
                                        " r--p ",
                                        "12"};
    size_t length = 0;
    while (below(40) != 0) {
        const char *word = words[below(sizeof words / sizeof words[0])];
        size_t more = strlen(word);
        if (length + more + 700 >= size)
            break;
        memcpy(text + length, word, more);
        length += more;
        switch (below(8)) {
        case 0:
            text[length++] = (char)any();
            break;
        case 1:
            memset(text + length, 'x', 600); /* longer than any buffer for a line */
            length += 600;
            break;
        case 2:
            text[length++] = '\0';
            break;
        default:
            text[length++] = '\n';
        }
    }
    return length;
}

static void any_file(int folder, const char *name) {
    static char text[1 << 16];
    size_t length = any_text(text, sizeof text);
    int file = SYS(openat(folder, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
    TRUE(write(file, text, length) == (ssize_t)length);
    close(file);
}

static int folder_in(int folder, const char *name) {
    if (mkdirat(folder, name, 0700) < 0)
        TRUE(errno == EEXIST);
    return SYS(openat(folder, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
}

static void look_for_holders(int proc) {
    static const char *const pids[] = {"1", "2", "99999999999999999999", "self"};
    struct tuck_dev devices[2] = {{0, 0x2a}, {0, 1}};
    uint64_t mount = 0, ids[2];
    size_t unseen = 0, room = below(MOST + 1);
    struct tuck_holder *found = exactly(room, sizeof *found);
    for (size_t i = 0; i < sizeof pids / sizeof pids[0]; i++) {
        int process = folder_in(proc, pids[i]);
        any_file(process, "maps");
        any_file(process, "status");
        close(folder_in(process, "map_files"));
        close(folder_in(process, "task"));
        int fd = folder_in(process, "fd"), info = folder_in(process, "fdinfo");
        if (symlinkat("anon_inode:inotify", fd, "3") < 0)
            TRUE(errno == EEXIST);
        any_file(fd, "4");
        any_file(info, "3");
        any_file(info, "4");
        close(info);
        close(fd);
        close(process);
    }
    OK(tuck_mount_id(proc, ".", 0, &mount));
    ids[0] = below(2) ? mount : any();
    ids[1] = UINT64_MAX;
    TRUE(OK(tuck_find_holders(proc, 0, 1, ids, below(3), devices, below(3), found, room, &unseen)) >= 0);
    free(found);
    TRUE(unseen <= sizeof pids / sizeof pids[0]);
}

static uint64_t number_from(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text != NULL && *text != '\0' ? strtoull(text, NULL, 10) : otherwise;
}

int main(int count, char **words) {
    TRUE(count == 2);
    uint64_t seed = number_from("TUCKCTL_FUZZ_SEED", (uint64_t)time(NULL) ^ (uint64_t)getpid() << 32);
    uint64_t examples = number_from("TUCKCTL_FUZZ_EXAMPLES", 300);
    printf("TUCKCTL_FUZZ_SEED=%" PRIu64 "\n", seed);
    fflush(stdout);
    state = seed != 0 ? seed : 1;
    SYS(chdir(words[1]));
    SYS(mkdir("proc", 0700));
    int proc = SYS(open("proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    for (uint64_t i = 0; i < examples; i++) {
        look_for_mounts();
        look_for_holders(proc);
    }
    size_t unseen;
    close(proc);
    FAILS(tuck_find_holders(proc, 0, 1, NULL, 0, NULL, 0, NULL, 0, &unseen), EBADF);
    return 0;
}
