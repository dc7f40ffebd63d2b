/* SPDX-License-Identifier: Apache-2.0 */
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>

/* Linux 5.8 and its headers. */
struct loop_config_ {
    uint32_t fd;
    uint32_t block_size;
    struct loop_info64 info;
    uint64_t reserved[8];
};

#define LOOP_CONFIGURE_ 0x4C0A
#define FICLONE_ _IOW(0x94, 9, int)

int tuck_loop_get_free(int control) {
    int number = ioctl(control, LOOP_CTL_GET_FREE);
    return number < 0 ? -errno : number;
}

int tuck_loop_configure(int loop, int backing, uint32_t block_size, uint32_t flags) {
    struct loop_config_ config = {.fd = (uint32_t)backing, .block_size = block_size, .info = {.lo_flags = flags}};
    return ioctl(loop, LOOP_CONFIGURE_, &config) < 0 ? -errno : 0;
}

int tuck_loop_clear(int loop) {
    return ioctl(loop, LOOP_CLR_FD, 0) < 0 ? -errno : 0;
}

int tuck_loop_status(int loop, struct tuck_loop_status *ret_status) {
    struct loop_info64 info;
    if (ioctl(loop, LOOP_GET_STATUS64, &info) < 0)
        return -errno;
    *ret_status = (struct tuck_loop_status){.backing_dev = info.lo_device,
                                            .backing_ino = info.lo_inode,
                                            .offset = info.lo_offset,
                                            .size_limit = info.lo_sizelimit,
                                            .number = info.lo_number,
                                            .flags = info.lo_flags};
    return 0;
}

int tuck_clone_file(int to, int from) {
    return ioctl(to, FICLONE_, from) < 0 ? -errno : 0;
}

/* Gives a file room for so many bytes in all; its size stays. */
int tuck_reserve(int file, uint64_t size) {
    return fallocate(file, FALLOC_FL_KEEP_SIZE, 0, (off_t)size) < 0 ? -errno : 0;
}
